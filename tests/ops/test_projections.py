"""The projections around the attention core, each against a convolution of PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fastgan.ops import pooled_projection, projection_residual
from fastgan.ops._pooled_projection import pooled_projection_op
from fastgan.ops._projections import projection_residual_op

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def images(shape, layout, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()


def pooled_operands(shape, outputs, dtype=torch.float64, layout=torch.contiguous_format, bias=True):
    x = images(shape, layout, dtype)
    weight = torch.randn(outputs, shape[1], dtype=dtype).requires_grad_()
    return x, weight, torch.randn(outputs, dtype=dtype).requires_grad_() if bias else None


def plain_pooled(x, weight, bias, d):
    y = F.conv2d(x, weight[:, :, None, None], bias)
    return y[:, :d].flatten(2).mT, F.max_pool2d(y[:, d:], 2).flatten(2).mT


def residual_operands(shape, e, dtype=torch.float64, layout=torch.contiguous_format, bias=True):
    b, c, h, w = shape
    rows, weight = (torch.randn(s, dtype=dtype).requires_grad_() for s in ((b, h * w, e), (c, e)))
    return rows, weight, torch.randn(c, dtype=dtype).requires_grad_() if bias else None, images(shape, layout, dtype)


def plain_residual(rows, weight, bias, x):
    return x + F.conv2d(rows.mT.unflatten(2, x.shape[2:]), weight[:, :, None, None], bias)


def three_orders(function, *inputs):
    """Outputs, first gradients and gradients of a penalty on them, for fixed cotangents."""
    inputs = [x.detach().requires_grad_() for x in inputs if x is not None]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)

    def cotangents(tensors):
        return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]

    cotangent = [c.requires_grad_() for c in cotangents(outputs)]
    first = torch.autograd.grad(outputs, inputs, cotangent, create_graph=True)
    penalty = sum((g * c).sum() for g, c in zip(first, cotangents(first), strict=True))
    wanted = [*inputs, *cotangent]
    second = torch.autograd.grad(penalty, wanted, allow_unused=True)
    zeros = (torch.zeros_like(t) for t in wanted)
    return [*outputs, *first, *(z if g is None else g for g, z in zip(second, zeros, strict=True))]


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
    opcheck(pooled_projection_op, (*pooled_operands((2, 3, 4, 5), 6), 2, "auto"))
    opcheck(projection_residual_op, (*residual_operands((2, 3, 4, 5), 6, layout=torch.channels_last), "auto"))


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
