import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call

from fastgan.nn import SelfAttention2d
from tests.accuracy import assert_as_accurate


class Canonical(nn.Module):
    """The block of BigGAN's code, written as there."""

    def __init__(self, channels, names=("theta", "phi", "g", "o", "gamma")):
        super().__init__()
        self.names, self.channels = names, channels
        for name, (c_in, c_out) in zip(
            names,
            ((channels, channels // 8),) * 2 + ((channels, channels // 2), (channels // 2, channels)),
            strict=False,
        ):
            self.add_module(name, nn.Conv2d(c_in, c_out, 1, bias=False))
        self.register_parameter(names[4], nn.Parameter(torch.tensor(0.6)))

    def forward(self, x):
        theta, phi, g, o, gamma = (getattr(self, name) for name in self.names)
        b, c, h, w = x.shape
        q = theta(x).view(b, c // 8, h * w)
        k = F.max_pool2d(phi(x), 2).view(b, c // 8, -1)
        v = F.max_pool2d(g(x), 2).view(b, c // 2, -1)
        beta = F.softmax(torch.bmm(q.transpose(1, 2), k), -1)
        return gamma * o(torch.bmm(v, beta.transpose(1, 2)).view(b, c // 2, h, w)) + x


class Simple(nn.Module):
    """The other common block: values as wide as x, biases, no pooling, no output convolution."""

    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.6))

    def forward(self, x):
        b, c, h, w = x.shape
        q = self.query_conv(x).view(b, -1, h * w).permute(0, 2, 1)
        attention = torch.softmax(torch.bmm(q, self.key_conv(x).view(b, -1, h * w)), dim=-1)
        out = torch.bmm(self.value_conv(x).view(b, -1, h * w), attention.permute(0, 2, 1))
        return self.gamma * out.view(b, c, h, w) + x


def penalty_gradient(block, x):
    """The gradient with respect to x of a WGAN-GP penalty on it."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad((gradient.flatten(1).norm(dim=1) - 1).square().sum(), x)[0]


SPELLINGS = [
    ("theta", "phi", "g", "o", "gamma"),
    ("conv1x1_theta", "conv1x1_phi", "conv1x1_g", "conv1x1_attn", "sigma"),
    ("snconv1x1_theta", "snconv1x1_phi", "snconv1x1_g", "snconv1x1_attn", "sigma"),
    ("f", "g", "h", "o", "gamma"),
]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("names", SPELLINGS, ids=lambda names: names[0])
def test_canonical_block_of_any_spelling(names, impl):
    original = Canonical(16, names).double()
    roles = {"theta": "f", "phi": "g", "g": "h"} if names[0] == "f" else None
    block = SelfAttention2d(16, impl=impl, roles=roles).double()
    block.load_state_dict(original.state_dict())
    x = torch.randn(2, 16, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(block(x), original(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(penalty_gradient(block, x), penalty_gradient(original, x), rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(("theta", "phi", "g", "o"), names, strict=False):
        a, b = block.get_submodule(ours).weight, original.get_submodule(theirs).weight
        ga, gb = (torch.autograd.grad(m(x).pow(3).sum(), w)[0] for m, w in ((block, a), (original, b)))
        torch.testing.assert_close(ga, gb, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_simple_block(impl):
    original = Simple(16).double()
    block = SelfAttention2d(16, value_channels=16, pool=False, bias=True, impl=impl).double()
    block.load_state_dict(original.state_dict())
    x = torch.randn(2, 16, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(block(x), original(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(penalty_gradient(block, x), penalty_gradient(original, x), rtol=1e-9, atol=1e-10)


class OverQueries(nn.Module):
    """A block whose softmax is over the first axis of theirs[0]^T theirs[1]: that one plays the part of phi."""

    def __init__(self, channels, names, layer=nn.Conv1d, first_axis=True):
        super().__init__()
        self.names, self.axis = names, 1 if first_axis else 2
        for name, width in zip(names, (channels // 8, channels // 8, channels), strict=True):
            self.add_module(name, layer(channels, width, 1, bias=False))
        self.gamma = nn.Parameter(torch.full((1,), 0.6))

    def forward(self, x):
        is_2d = isinstance(getattr(self, self.names[0]), nn.Conv2d)
        f, g, h = (getattr(self, name)(x if is_2d else x.flatten(2)).flatten(2) for name in self.names)
        beta = torch.softmax(f.mT @ g, dim=self.axis)
        return x + self.gamma * (h @ (beta if self.axis == 1 else beta.mT)).view_as(x)


def in_sequentials(block):
    """The keys of a block whose layers are the first of an nn.Sequential, as fastai's."""
    return {key.replace(".weight", ".0.weight"): value for key, value in block.state_dict().items()}


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d], ids=["1d", "2d"])
@pytest.mark.parametrize("names", [("query", "key", "value"), ("f", "g", "h"), ("q", "k", "v")], ids="-".join)
@pytest.mark.parametrize("first_axis", [True, False])
def test_names_that_do_not_distinguish_query_from_key_need_roles(names, layer, first_axis):
    a, b, c = names
    original, x = OverQueries(16, names, layer, first_axis), torch.randn(2, 16, 4, 6)
    with pytest.raises(RuntimeError, match="do not say over which .* the softmax runs.*roles="):
        SelfAttention2d(16, value_channels=16, pool=False).load_state_dict(original.state_dict())
    roles = {"theta": b, "phi": a, "g": c} if first_axis else {"theta": a, "phi": b, "g": c}
    block = SelfAttention2d(16, value_channels=16, pool=False, roles=roles)
    block.load_state_dict(original.state_dict())
    torch.testing.assert_close(block(x), original(x), rtol=1e-5, atol=1e-6)
    other = SelfAttention2d(16, value_channels=16, pool=False, roles=roles)
    other.load_state_dict(block.state_dict())  # its own names still load
    torch.testing.assert_close(other(x), original(x), rtol=1e-5, atol=1e-6)


def test_one_dimensional_query_conv_needs_roles_and_fastai_is_exchanged():
    names, x = ("query_conv", "key_conv", "value_conv"), torch.randn(2, 16, 4, 6)
    block = SelfAttention2d(16, value_channels=16, pool=False)
    with pytest.raises(RuntimeError, match="roles="):
        block.load_state_dict(OverQueries(16, names).state_dict())
    fastai = OverQueries(16, ("query", "key", "value"))
    block.load_state_dict(in_sequentials(fastai))
    torch.testing.assert_close(block(x), fastai(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"theta": "a", "phi": "b"}, "roles must name theta, phi and g"),
        ({"theta": "a", "phi": "b", "g": "c", "h": "d"}, "roles must name theta, phi and g, and may name o and gamma"),
        ({"theta": "a", "phi": "a", "g": "c"}, "roles must be different names"),
        ({"theta": "phi", "phi": "theta", "g": "g"}, "roles must not give theta the name of another part"),
    ],
)
def test_bad_roles(roles, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention2d(16, roles=roles)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 1, 1, 1)])
def test_gamma_of_any_shape_loads(shape):
    block = SelfAttention2d(16)
    block.load_state_dict({**block.state_dict(), "gamma": torch.full(shape, 0.25)})
    assert block.gamma.shape == (1,)  # fully_shard refuses a shape of ()
    assert block.gamma.item() == 0.25


def test_further_singular_vectors_of_biggan_are_left_out():
    block = SelfAttention2d(16, spectral_norm=True)
    theirs = {"gamma": torch.zeros(())}
    for name in ("theta", "phi", "g", "o"):
        weight = block.get_submodule(name).weight.detach()
        theirs[f"{name}.weight"] = weight
        for i in range(2):
            theirs[f"{name}.u{i}"], theirs[f"{name}.sv{i}"] = torch.randn(1, len(weight)), torch.ones(1)
    block.load_state_dict(theirs)
    assert torch.equal(block.theta.parametrizations.weight.original, theirs["theta.weight"])


def test_a_third_derivative_names_the_way_to_it():
    blocks = {impl: SelfAttention2d(8, impl=impl).double() for impl in ("reference", "eager")}
    blocks["reference"].gamma.data.fill_(0.7)
    blocks["eager"].load_state_dict(blocks["reference"].state_dict())
    x = torch.randn(1, 8, 4, 2, dtype=torch.float64, requires_grad=True)

    def derivatives(block, order):
        value = block(x).pow(2).sum()
        for _ in range(order):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.pow(2).sum()
        return gradient

    torch.testing.assert_close(derivatives(blocks["eager"], 2), derivatives(blocks["reference"], 2))
    with pytest.raises(RuntimeError, match="gradients to second order; use impl='eager'"):
        derivatives(blocks["reference"], 3)

    def second_derivative(x):
        (gradient,) = torch.autograd.grad(blocks["eager"](x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second_derivative, x)


def test_a_convolution_with_its_own_way_to_its_weight_is_called():
    class Standardized(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    block, plain = SelfAttention2d(16), SelfAttention2d(16)
    for name in ("theta", "phi", "g", "o"):
        conv = block.get_submodule(name)
        setattr(block, name, Standardized(conv.in_channels, conv.out_channels, 1, bias=False))
        plain.get_submodule(name).weight.data = (
            block.get_submodule(name).weight - block.get_submodule(name).weight.mean()
        )
    for b in (block, plain):
        b.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(block(x), plain(x))


def test_traced_blocks_are_plain_operators():
    block = SelfAttention2d(16).eval()
    block.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 4, 4)
    traced = torch.jit.trace(block, x)
    assert "fastgan::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x + 1), block(x + 1))
    x = torch.randn(3, 16, 6, 8)
    torch.testing.assert_close(traced(x), block(x))


def test_replicas_of_data_parallel_take_their_own_parameters():
    block = SelfAttention2d(16)
    replica = block._replicate_for_data_parallel()
    for name in ("theta", "phi", "g", "o"):
        setattr(replica, name, block.get_submodule(name))
    replica.gamma = torch.ones(1)  # a tensor that is no parameter
    block.gamma.data.fill_(1.0)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(replica(x), block(x))


def test_other_keys_are_still_reported():
    with pytest.raises(RuntimeError, match="Missing key"):
        SelfAttention2d(16).load_state_dict({"query_conv.weight": torch.zeros(2, 16, 1, 1)})


def test_gamma_starts_at_zero_and_learns():
    block = SelfAttention2d(16)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.gamma.grad.abs() > 0


def test_gradients_of_both_orders_match_finite_differences():
    block = SelfAttention2d(8, bias=True, impl="reference").double()
    block.gamma.data.fill_(0.7)
    x = torch.randn(1, 8, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradgradcheck(block, x)


def test_attention_map():
    block = SelfAttention2d(16)
    block.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 6, 4)
    y, attention_map = block(x, return_attention=True)
    assert attention_map.shape == (2, 24, 6)
    torch.testing.assert_close(attention_map.sum(dim=2), torch.ones(2, 24))
    torch.testing.assert_close(y, block(x))


@pytest.mark.parametrize("bias", [False, True])
def test_hooks_of_the_convolutions_run(bias):
    """The older spectral norm is a hook: reading a weight alone would miss it."""
    block = SelfAttention2d(16, bias=bias)
    block.gamma.data.fill_(0.7)
    for name in ("theta", "phi", "g", "o"):
        torch.nn.utils.spectral_norm(getattr(block, name))
    before = block.phi.weight_u.clone()
    x = torch.randn(2, 16, 4, 4)
    y = block(x)
    assert not torch.equal(before, block.phi.weight_u)
    plain = SelfAttention2d(16, bias=bias)
    plain.gamma.data.fill_(0.7)
    for name in ("theta", "phi", "g", "o"):
        getattr(plain, name).weight.data.copy_(getattr(block, name).weight)
        if bias:
            getattr(plain, name).bias.data.copy_(getattr(block, name).bias)
    torch.testing.assert_close(y, plain(x))


def test_spectral_norm_option():
    block = SelfAttention2d(16, spectral_norm=True)
    for _ in range(100):
        block(torch.randn(1, 16, 4, 4))
    for conv in (block.theta, block.phi, block.g, block.o):
        assert abs(torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() - 1) < 1e-3


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_channels_last_is_kept(impl):
    block = SelfAttention2d(16, impl=impl)
    block.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 6, 4)
    y = block(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, block(x))


@pytest.mark.parametrize("bias", [True, False])
def test_queries_and_keys_that_are_padded_for_the_kernels(bias, device):
    """24 channels have 3 query channels; Triton's projection makes 8, five of which are zero."""
    pytest.importorskip("triton")
    block = SelfAttention2d(24, bias=bias, impl="triton").to(device)
    nn.init.constant_(block.gamma, 0.6)
    x = torch.randn(2, 24, 7, 6, device=device)

    def outputs_and_gradients(impl, dtype):
        twin, inputs = copy.deepcopy(block).to(dtype), x.to(dtype).requires_grad_()
        twin.impl = impl
        y = twin(inputs)
        wanted = [inputs, *twin.parameters()]
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wanted, allow_unused=True)
        return [y, *first, *(g for g in second if g is not None)]

    truth = outputs_and_gradients("eager", torch.float64)
    plain = outputs_and_gradients("eager", torch.float32)
    for actual, p, t in zip(outputs_and_gradients("triton", torch.float32), plain, truth, strict=True):
        if t.norm() > 1e-9:
            assert_as_accurate(actual, p, t)
        else:  # the softmax does not depend on a bias of the keys: what is left of its gradient is rounding
            assert actual.norm() <= 1e-4


def test_compile_export_functional_call_and_deepcopy():
    block = SelfAttention2d(16)
    block.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 6, 4)
    y = block(x)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=graphs)
    torch.testing.assert_close(compiled(x), y)
    for size in (3, 5, 7):
        compiled(torch.randn(size, 16, 6, 4))
    assert graphs.frame_count <= 2  # one for all sizes, or one before the first that is not 2
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), y)
    torch.testing.assert_close(copy.deepcopy(block)(x), y)
    zeroed = torch.func.functional_call(block, {"gamma": torch.zeros(())}, (x,))
    torch.testing.assert_close(zeroed, x)


def test_compiled_gradients_equal_eager():
    block = SelfAttention2d(16, impl="reference")
    block.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    actual = torch.autograd.grad(torch.compile(block, fullgraph=True)(x).square().sum(), [x, *block.parameters()])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_residual_in_float32():
    block = SelfAttention2d(16)
    block.gamma.data.fill_(1e-3)
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, block(x), rtol=0, atol=1e-4)
    y.sum().backward()
    assert block.theta.weight.grad.dtype == torch.float32


def test_onnx_export_uses_plain_operators(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    block = SelfAttention2d(16).eval()
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, (torch.randn(2, 16, 4, 4),), str(path), dynamo=True)
    assert not any("fastgan" in node.domain for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 12}, "in_channels must be divisible by 8 if qk_channels is not given, got 12"),
        ({"in_channels": 7, "qk_channels": 2}, "in_channels must be divisible by 2 if value_channels is not given"),
        ({"in_channels": 16, "qk_channels": 0}, "qk_channels must be at least 1"),
        ({"in_channels": 16, "impl": "cuda"}, "impl must be one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention2d(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 4, 4), r"x must have shape \(B, 16, H, W\)"),
        ((16, 4, 4), "x must have"),
        ((1, 16, 1, 4), "at least 2 x 2"),
    ],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention2d(16)(torch.randn(shape))


def test_transforms_of_torch_func_and_forward_mode():
    """Per-sample gradients and a directional derivative, which do not see the ops' registered gradients."""
    block = SelfAttention2d(8, impl="reference").double()
    nn.init.constant_(block.gamma, 0.5)
    weights = {name: p.detach() for name, p in block.named_parameters()}
    x = torch.randn(3, 1, 8, 4, 4, dtype=torch.float64)

    def loss(weights, x):
        return functional_call(block, weights, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(3):
        expected = torch.autograd.grad(block(x[i]).square().sum(), list(block.parameters()))
        torch.testing.assert_close([each[name][i] for name in weights], list(expected))
    direction = torch.randn_like(x[0])
    expected = (block(x[0] + 1e-5 * direction) - block(x[0] - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close(torch.func.jvp(block, (x[0],), (direction,))[1], expected, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(block(forward_ad.make_dual(x[0], direction))).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)
