"""The projections around the attention core, each against a convolution of PyTorch's."""

import pytest
import torch
from torch.library import opcheck

from fastgan.ops import pooled_projection, projection_residual
from fastgan.ops._projections import pooled_projection_op, projection_residual_op
from tests.ops.operands import LAYOUTS, plain_pooled, plain_residual, pooled_operands, residual_operands, three_orders


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 5, 5, 3), (0, 3, 4, 4)])
def test_pooled_projection_equals_a_convolution_and_a_pooling(shape, bias, layout):
    x, weight, b = pooled_operands(shape, 7, bias=bias, layout=layout)
    inputs = [x, weight] + [b] * bias
    ours = three_orders(lambda x, w, b=None: pooled_projection(x, w, b, 3), *inputs)
    plain = three_orders(lambda x, w, b=None: plain_pooled(x, w, b, 3), *inputs)
    for a, p in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, p, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 5, 5, 3), (0, 3, 4, 4)])
def test_projection_residual_equals_a_convolution_and_a_sum(shape, bias, layout):
    rows, weight, b, x = residual_operands(shape, 4, bias=bias, layout=layout)
    if bias:
        ours = three_orders(projection_residual, rows, weight, b, x)
        plain = three_orders(plain_residual, rows, weight, b, x)
    else:
        ours = three_orders(lambda r, w, x: projection_residual(r, w, None, x), rows, weight, x)
        plain = three_orders(lambda r, w, x: plain_residual(r, w, None, x), rows, weight, x)
    assert ours[0].is_contiguous(memory_format=layout)
    for a, p in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, p, rtol=1e-11, atol=1e-11)


def test_gradients_of_both_orders_match_finite_differences():
    inputs = pooled_operands((1, 2, 4, 3), 5)
    assert torch.autograd.gradcheck(lambda *t: pooled_projection(*t, 2), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: pooled_projection(*t, 2), inputs)
    inputs = residual_operands((1, 2, 2, 3), 3)
    assert torch.autograd.gradcheck(projection_residual, inputs)
    assert torch.autograd.gradgradcheck(projection_residual, inputs)


def test_opcheck():
    opcheck(pooled_projection_op, (*pooled_operands((2, 3, 4, 5), 6), 2, "reference"))
    opcheck(projection_residual_op, (*residual_operands((2, 3, 4, 5), 6, layout=torch.channels_last), "reference"))


def test_a_wider_feature_map_than_weight():
    x, weight, _ = pooled_operands((2, 4, 4, 4), 6, torch.float32)
    q, kv = pooled_projection(x, weight.bfloat16(), None, 2)
    assert q.dtype == kv.dtype == torch.bfloat16
    y = projection_residual(kv.repeat(1, 4, 1), torch.randn(4, 4, dtype=torch.bfloat16), None, x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b, d: (x[0], w, b, d), "x must have 4 dimensions"),
        (lambda x, w, b, d: (x, w[:, :2], b, d), r"weight must have shape \(outputs, 3\)"),
        (lambda x, w, b, d: (x, w, b, 6), "qk_channels must be between 1 and 5, got 6"),
        (lambda x, w, b, d: (x[:, :, :1], w, b, d), "at least 2 x 2 pixels"),
        (lambda x, w, b, d: (x, w, b[:2], d), r"bias must have shape \(6,\)"),
        (lambda x, w, b, d: (x, w.to("meta"), b, d), "weight must be on the device of x"),
    ],
)
def test_bad_input_of_pooled_projection(change, message):
    with pytest.raises(ValueError, match=message):
        pooled_projection(*change(*pooled_operands((2, 3, 4, 4), 6), 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, w, b, x: (r[:, :3], w, b, x), r"rows must have shape \(2, 16, e\)"),
        (lambda r, w, b, x: (r, w[:2], b, x), r"weight must have shape \(3, 6\)"),
        (lambda r, w, b, x: (r, w, b.float(), x), r"bias must have shape \(3,\) and dtype torch.float64"),
        (lambda r, w, b, x: (r, w.float(), b, x), "weight must have the dtype of rows"),
        (lambda r, w, b, x: (r, w, b, x.to("meta")), "x must be on the device of rows"),
    ],
)
def test_bad_input_of_projection_residual(change, message):
    with pytest.raises(ValueError, match=message):
        projection_residual(*change(*residual_operands((2, 3, 4, 4), 6)))
