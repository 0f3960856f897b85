"""The projection kernels against convolutions in float64: on a GPU where there is one, else interpreted."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from fastgan.nn import SelfAttention2d
from fastgan.ops import pooled_projection, projection_residual
from tests.accuracy import assert_as_accurate
from tests.ops.operands import (
    LAYOUTS,
    plain_pooled,
    plain_residual,
    pooled_operands,
    residual_operands,
    three_orders,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(autouse=True)
def full_precision():
    """Compare with convolutions that do not round to TF32."""
    convolution = torch.backends.cudnn.conv
    before, convolution.fp32_precision = convolution.fp32_precision, "ieee"
    yield
    convolution.fp32_precision = before


def assert_orders_match(run, truth, *inputs):
    """``run(impl)`` is the function to test; both implementations have torch's products in their gradients."""
    plain, ours = (three_orders(run(impl), *inputs) for impl in ("reference", "triton"))
    exact = three_orders(truth, *(x.double() for x in inputs))
    for i, (a, p, t) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_as_accurate(a, p, t, f"result {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "outputs"), [((2, 8, 6, 4), 6), ((1, 40, 5, 19), 33), ((1, 3, 2, 70), 140)])
def test_pooled_projection(shape, outputs, dtype, layout, device):
    inputs = [t.detach().to(device) for t in pooled_operands(shape, outputs, dtype, layout)]
    if dtype != torch.float32:  # whole numbers: no window has a near tie that rounding could turn over
        inputs = [(2 * t).round() for t in inputs]
    assert_orders_match(
        lambda impl: lambda x, w, b: pooled_projection(x, w, b, outputs // 3, impl=impl),
        lambda x, w, b: plain_pooled(x, w, b, outputs // 3),
        *inputs,
    )


def test_ties_and_nan_are_pooled_as_by_torch(device):
    x = torch.ones(1, 1, 4, 4, device=device)
    x[0, 0, 2, 1] = float("nan")
    x.requires_grad_()
    weight = torch.ones(2, 1, device=device)
    for function in (lambda *t: pooled_projection(*t, impl="triton"), plain_pooled):
        _, kv = function(x, weight, None, 1)
        (gradient,) = torch.autograd.grad(kv.nan_to_num().sum(), x)
        assert kv.isnan().flatten().tolist() == [False, False, True, False]
        assert gradient[0, 0].nonzero().tolist() == [[0, 0], [0, 2], [2, 2]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "e"), [((2, 6, 4, 5), 8), ((1, 130, 3, 23), 40)])
def test_projection_residual(shape, e, dtype, layout, device):
    inputs = [t.detach().to(device) for t in residual_operands(shape, e, dtype, layout)]
    assert_orders_match(lambda impl: functools.partial(projection_residual, impl=impl), plain_residual, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_whole_block(bias, layout, dtype, device):
    """SelfAttention2d with every kernel in it against itself in plain PyTorch."""
    fused = SelfAttention2d(16, bias=bias, impl="triton").to(device, dtype)
    torch.nn.init.constant_(fused.gamma, 0.7)
    plain, truth = (SelfAttention2d(16, bias=bias, impl="reference").to(device, dt) for dt in (dtype, torch.float64))
    plain.load_state_dict(fused.state_dict())
    truth.load_state_dict(fused.state_dict())
    x = torch.randn(2, 16, 6, 8, device=device, dtype=dtype).contiguous(memory_format=layout)
    assert fused(x).is_contiguous(memory_format=layout)

    def penalty(block, x):
        x = x.clone().requires_grad_()
        y = block(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        loss = (gradient.float().flatten(1).norm(dim=1) - 1).square().mean()
        # phi's bias shifts all logits of a row alike, so that its gradient is rounding alone.
        weights = [p for name, p in block.named_parameters() if name != "phi.bias"]
        return [y, gradient, *torch.autograd.grad(loss, weights)]

    results = zip(penalty(fused, x), penalty(plain, x), penalty(truth, x.double()), strict=True)
    for i, (a, p, t) in enumerate(results):
        assert_as_accurate(a, p, t, f"result {i}")


def test_autocast(device):
    block = SelfAttention2d(16, impl="triton").to(device)
    torch.nn.init.constant_(block.gamma, 1e-3)
    x = torch.randn(2, 16, 4, 4, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, block(x), rtol=0, atol=1e-4)
    y.sum().backward()
    assert block.theta.weight.grad.dtype == torch.float32


def test_blocks_with_a_bias_or_a_hook_on_some_convolutions(device):
    block = SelfAttention2d(8, bias=True, impl="triton").to(device)
    torch.nn.init.constant_(block.gamma, 0.5)
    block.phi.bias = None
    x = torch.randn(1, 8, 4, 4, device=device, requires_grad=True)
    torch.testing.assert_close(block(x), block(x, return_attention=True)[0], rtol=1e-4, atol=1e-5)
    seen = []
    block.theta.register_full_backward_pre_hook(lambda *_: seen.append(1))
    block(x).sum().backward()
    assert seen


@pytest.mark.parametrize("options", [{}, {"pool": False, "value_channels": 8}])
def test_blocks_with_kernels_compile_whole(options, device):
    block = SelfAttention2d(8, impl="triton", **options).to(device)
    torch.nn.init.constant_(block.gamma, 0.5)
    x = torch.randn(2, 8, 4, 6, device=device, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        (compiled(x), *torch.autograd.grad(compiled(x).sum(), x)),
        (block(x), *torch.autograd.grad(block(x).sum(), x)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
