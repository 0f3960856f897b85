"""The C++ projections on a CPU against convolutions and pooling of PyTorch's."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastgan import backend
from fastgan.nn import SelfAttention2d
from fastgan.ops import pooled_projection, projection_residual
from fastgan.ops._projections import (
    _projection_gradients,
    gather_pooled_op,
    pooled_projection_op,
    projection_gradients_op,
    projection_residual_op,
    unpool_op,
)
from tests.accuracy import assert_as_accurate
from tests.extension.checks import assert_same_for_any_number_of_threads
from tests.ops.operands import LAYOUTS, plain_pooled, plain_residual, pooled_operands, residual_operands, three_orders

pytestmark = pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")

pooled = functools.partial(pooled_projection, impl="extension")
residual = functools.partial(projection_residual, impl="extension")


def assert_close(ours, plain):
    for a, p in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, p, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(2, 7), st.integers(2, 40)),
    st.integers(2, 40),
    st.data(),
    st.sampled_from(LAYOUTS),
    st.booleans(),
)
def test_pooled_projection_equals_a_convolution_and_a_pooling(shape, outputs, data, layout, bias):
    d = data.draw(st.integers(1, outputs - 1))
    x, weight, b = pooled_operands(shape, outputs, bias=bias, layout=layout)
    inputs = [x, weight] + [b] * bias
    ours = three_orders(lambda x, w, b=None: pooled(x, w, b, d), *inputs)
    assert_close(ours, three_orders(lambda x, w, b=None: plain_pooled(x, w, b, d), *inputs))


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 20)),
    st.integers(1, 40),
    st.sampled_from(LAYOUTS),
)
def test_projection_residual_equals_a_convolution_and_a_sum(shape, e, layout):
    operands = residual_operands(shape, e, layout=layout)
    ours = three_orders(residual, *operands)
    assert ours[0].is_contiguous(memory_format=layout)
    assert_close(ours, three_orders(plain_residual, *operands))


def test_strided_operands():
    x, weight, bias = pooled_operands((2, 6, 10, 12), 14)
    x, weight, bias = x[:, ::2, 1:8, ::2].mT, weight[::2, ::2], bias[::2]
    assert_close(
        three_orders(lambda *t: pooled(*t, 3), x, weight, bias),
        three_orders(lambda *t: plain_pooled(*t, 3), x, weight, bias),
    )
    rows, weight, bias, _ = residual_operands((2, 3, 6, 7), 8)
    rows, weight = torch.cat([rows, rows], dim=1)[:, ::2, ::2], weight[:, ::2]
    assert_close(three_orders(residual, rows, weight, bias, x), three_orders(plain_residual, rows, weight, bias, x))


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 3, 2, 4)])
def test_unpooling_and_gathering_are_each_others_gradient(shape):
    """Windows do not cover the last row and column of odd images; third derivatives exist."""
    x, weight, bias = pooled_operands(shape, 7)
    *_, index = pooled_projection_op(x, weight, bias, 3, "extension")
    pixels, width = shape[2] * shape[3], shape[3]
    grad = torch.randn(shape[0], pixels, 7, dtype=torch.float64, requires_grad=True)
    q, kv = gather_pooled_op(grad, index, width)
    other = [torch.randn_like(t).requires_grad_() for t in (q, kv)]
    spread = unpool_op(*other, index, width)
    torch.testing.assert_close((spread * grad).sum(), sum((a * b).sum() for a, b in zip(other, (q, kv), strict=True)))
    opcheck(unpool_op, (*other, index, width))
    opcheck(gather_pooled_op, (grad, index, width))
    strided = torch.stack([grad, grad], dim=3)[..., 0]
    assert all(torch.equal(a, b) for a, b in zip(gather_pooled_op(strided, index, width), (q, kv), strict=True))


def test_the_gradient_has_an_operator_of_the_extension(monkeypatch):
    """The reference is not called for a gradient that is differentiated itself, nor for a compiled one."""
    monkeypatch.setattr("fastgan.reference.projections.pooled_projection_bwd", None)
    operands = pooled_operands((2, 6, 5, 7), 9)

    def penalty(x, weight, bias):
        q, kv = pooled(x, weight, bias, 3)
        (gradient,) = torch.autograd.grad(q.square().sum() + kv.square().sum(), x, create_graph=True)
        return gradient.square().sum()

    def plain(x, weight, bias):
        q, kv = plain_pooled(x, weight, bias, 3)
        (gradient,) = torch.autograd.grad(q.square().sum() + kv.square().sum(), x, create_graph=True)
        return gradient.square().sum()

    expected = torch.autograd.grad(plain(*operands), operands)
    torch.testing.assert_close(torch.autograd.grad(penalty(*operands), operands), expected)
    loss = torch.compile(lambda *t: sum(y.square().sum() for y in pooled(*t, 3)), fullgraph=True)
    expected = torch.autograd.grad(sum(y.square().sum() for y in plain_pooled(*operands, 3)), operands)
    torch.testing.assert_close(torch.autograd.grad(loss(*operands), operands), expected)


def operands_of_the_products(layout):
    grad, rows = (torch.randn(2, 5, c, dtype=torch.float64) for c in (3, 4))
    grad = grad.mT.contiguous().mT if "gradient" in layout else grad
    rows = rows.mT.contiguous().mT if "x" in layout else rows
    return [t.requires_grad_() for t in (grad, rows, torch.randn(3, 4, dtype=torch.float64))]


PRODUCT_LAYOUTS = ["rows", "pixels of the gradient", "pixels of x"]


@pytest.mark.parametrize("layout", PRODUCT_LAYOUTS)
def test_the_op_of_the_products(layout):
    opcheck(projection_gradients_op, operands_of_the_products(layout))


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("layout", PRODUCT_LAYOUTS)
def test_gradients_of_the_products(layout, wanted):
    """All or one of them differentiated."""
    grad, rows, weight = operands = operands_of_the_products(layout)

    def products(grad, rows, weight):
        both = _projection_gradients(grad, rows, weight)
        return tuple(both[i] for i in wanted)

    both = (grad @ weight, (grad.mT @ rows).sum(0))
    torch.testing.assert_close(products(*operands), tuple(both[i] for i in wanted))
    assert torch.autograd.gradcheck(products, operands)
    assert torch.autograd.gradgradcheck(products, operands)


def first_gradients(function, *inputs):
    """Without a graph of their own, unlike those of ``three_orders``."""
    inputs = [x.detach().requires_grad_() for x in inputs]  # as they are in memory
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    shapes = [y.shape for y in outputs]
    cotangents = [torch.randn(s, generator=generator, dtype=torch.float64).bfloat16() for s in shapes]
    cotangents = [
        torch.empty_like(y).copy_(c) if y.ndim == 4 else c.to(y) for y, c in zip(outputs, cotangents, strict=True)
    ]
    return torch.autograd.grad(outputs, inputs, cotangents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 3, 2, 3), (2, 20, 9, 11), (9, 36, 12, 16), (3, 65, 2, 2), (0, 4, 4, 4)])
def test_first_gradients(shape, layout, dtype):
    """One pixel tile and many, sizes that are not multiples of a vector, and empty batches."""
    x, weight, bias = pooled_operands(shape, 23, layout=layout)
    narrow = [t.detach().to(dtype) for t in (x, weight, bias)]
    rows = torch.randn(shape[0], shape[2] * shape[3], 18, dtype=torch.float64)
    other = [t.to(dtype) for t in (rows, torch.randn(shape[1], 18), torch.randn(shape[1]))]
    cases = (
        (lambda *t: pooled(*t, 5), lambda *t: plain_pooled(*t, 5), narrow),
        (residual, plain_residual, [*other, narrow[0]]),
        (residual, plain_residual, [other[0].mT.contiguous().mT, other[1].T.contiguous().T, other[2], narrow[0]]),
    )
    for ours, plain, inputs in cases:
        found = first_gradients(ours, *inputs)
        truth, naive = first_gradients(plain, *(t.double() for t in inputs)), first_gradients(plain, *inputs)
        for i, (a, p, t) in enumerate(zip(found, naive, truth, strict=True)):
            assert a.dtype == dtype
            assert_as_accurate(a, p, t, f"{i}")


def test_first_gradients_do_not_depend_on_the_number_of_threads():
    x, weight, _ = pooled_operands((5, 36, 12, 16), 23, torch.float32)
    assert_same_for_any_number_of_threads(lambda: first_gradients(lambda x, w: pooled(x, w, None, 5), x, weight))


def test_gradients_of_both_orders_match_finite_differences():
    inputs = pooled_operands((1, 2, 4, 3), 5)
    assert torch.autograd.gradcheck(lambda *t: pooled(*t, 2), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: pooled(*t, 2), inputs)
    inputs = residual_operands((1, 2, 2, 3), 3)
    assert torch.autograd.gradcheck(residual, inputs)
    assert torch.autograd.gradgradcheck(residual, inputs)


def test_opcheck():
    opcheck(pooled_projection_op, (*pooled_operands((2, 3, 4, 5), 6), 2, "extension"))
    opcheck(projection_residual_op, (*residual_operands((2, 3, 4, 5), 6, layout=torch.channels_last), "extension"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_accurate_as_plain_torch(dtype, x_dtype, layout):
    x, weight, bias = pooled_operands((2, 48, 9, 35), 30, layout=layout)
    x = x.to(x_dtype)
    narrow = [t.to(dtype) for t in (weight, bias)]
    truth, plain = plain_pooled(x.double(), weight, bias, 6), plain_pooled(x.to(dtype), *narrow, 6)
    for a, p, t, name in zip(pooled(x, *narrow, 6), plain, truth, ("q", "kv"), strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, p, t, name)
    rows, weight, bias, _ = residual_operands((2, 48, 9, 35), 24)
    narrow = [t.to(dtype) for t in (rows, weight, bias)]
    y = residual(*narrow, x)
    assert y.dtype == x_dtype
    plain = plain_residual(*narrow, x.to(dtype)).to(x_dtype)
    assert_as_accurate(y, plain, plain_residual(rows, weight, bias, x.double()), "y")


def test_nan_and_infinity_match_torch():
    x, weight, bias = (t.detach() for t in pooled_operands((1, 3, 6, 18), 5, torch.float32))
    for value, at in ((float("nan"), (1, 2, 3)), (float("inf"), (0, 1, 0)), (-float("inf"), (2, 4, 17))):
        x[(0, *at)] = value
    x[0, :, :2, 4:6] = -float("inf")
    for a, p in zip(pooled(x, weight.abs(), bias, 2), plain_pooled(x, weight.abs(), bias, 2), strict=True):
        torch.testing.assert_close(a, p, equal_nan=True)


def test_the_first_of_equal_pixels_and_the_last_nan_take_the_gradient():
    x = torch.ones(1, 1, 2, 4, requires_grad=True)
    with torch.no_grad():
        x[0, 0, 0, 2:] = float("nan")
    weight = torch.ones(2, 1)
    (dx,) = torch.autograd.grad(pooled(x, weight, None, 1)[1], x, torch.ones(1, 2, 1))
    (plain,) = torch.autograd.grad(plain_pooled(x, weight, None, 1)[1], x, torch.ones(1, 2, 1))
    assert torch.equal(dx, plain)


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias = pooled_operands((3, 20, 9, 37), 24, torch.float32)

    def run():
        q, kv = pooled(x, weight, bias, 8)
        return q, kv, residual(q, weight[:20, :8], None, x)

    assert_same_for_any_number_of_threads(run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_equals_the_eager_one(layout):
    block, eager = (
        SelfAttention2d(16, bias=True, spectral_norm=True, impl=impl).double() for impl in ("extension", "eager")
    )
    eager.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 6, 10, dtype=torch.float64).contiguous(memory_format=layout)
    for module in (block, eager):
        torch.nn.init.constant_(module.gamma, 0.7)
    ours, plain = (three_orders(module, x) for module in (block, eager))
    assert_close(ours, plain)
    assert_close(block.buffers(), eager.buffers())  # each weight was read once: one update of its vectors


@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_without_gradients_is_as_accurate_as_the_eager_one(dtype, layout, bias):
    torch.manual_seed(0)
    block, eager = (SelfAttention2d(16, bias=bias, scale=0.3, impl=impl) for impl in ("extension", "eager"))
    torch.nn.init.constant_(block.gamma, 0.7)
    eager.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 7, 10, dtype=torch.float64)
    x = x.mT.contiguous().mT if layout == "transposed" else x.contiguous(memory_format=layout)
    with torch.no_grad():
        truth = eager.double()(x.to(dtype).double())
        ours, plain = (module.to(dtype)(x.to(dtype)) for module in (block, eager))
        assert_as_accurate(ours, plain, truth, "y")
        assert ours.dtype == dtype
    three_ops = block(x.to(dtype))  # one by one, for their gradients
    assert three_ops.requires_grad
    assert three_ops.stride() == ours.stride()
    torch.testing.assert_close(three_ops.detach(), ours)


def test_a_block_without_gradients_under_autocast():
    block = SelfAttention2d(16, bias=True, spectral_norm=True, impl="extension").eval()
    torch.nn.init.constant_(block.gamma, 0.7)
    x = torch.randn(2, 16, 6, 8)
    for image in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                y = block(image)
            expected = block(image)
        assert y.dtype == expected.dtype == image.dtype
        torch.testing.assert_close(y, expected.detach())


def test_a_block_without_gradients_has_no_other_scale_or_size():
    x = torch.randn(2, 16, 6, 8)
    for scale in (-0.5, 0.0):
        block = SelfAttention2d(16, scale=scale, impl="extension")
        torch.nn.init.constant_(block.gamma, 0.7)
        expected = block(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(block(x), expected)
            assert block(x[:0]).shape == (0, 16, 6, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_block_without_gradients_has_nan_where_eager_has_it(value):
    block, eager = (SelfAttention2d(16, impl=impl) for impl in ("extension", "eager"))
    torch.nn.init.constant_(block.gamma, 0.7)
    eager.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 6, 8)
    x[1, 3, 2, 5] = value
    with torch.no_grad():
        assert torch.equal(block(x).isnan(), eager(x).isnan())
