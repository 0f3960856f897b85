"""Properties that only a GPU can show: graphs that replay, peak memory, races, a second device, compiled strides.

The bodies also run on a CPU with Triton's interpreter; a graph is then the function itself.
"""

import functools

import pytest
import torch
from torch import nn
from torch.library import opcheck

pytest.importorskip("triton")

from fastgan.kernels import launch as launching
from fastgan.kernels.spectral_norm import launch as norm_kernels
from fastgan.kernels.spectral_norm import plan as spectral_norm_plan
from fastgan.nn import SelfAttention2d, group_spectral_norm
from fastgan.ops import attention, spectral_norm_scale, spectral_norm_update
from fastgan.ops._attention import attention_bwd_bwd_op, attention_bwd_op, attention_op
from fastgan.ops._projections import pooled_projection_op, projection_residual_op
from fastgan.reference import spectral_norm as norm_reference
from tests.kernels.vectors import assert_accurate, double, random_vectors
from tests.ops.operands import block_operands, three_passes

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]


def captured(function):
    """``function`` as a CUDA graph: a call replays it and returns its results, which the next replay overwrites."""
    if not torch.cuda.is_available():
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay():
        graph.replay()
        return results

    return replay


def critic_weights(device, width=1):
    """Odd sizes beside long layers, which several hundred programs share."""
    torch.manual_seed(0)
    shapes = [(7, 5), (96 * width, 3, 3, 3), (192 * width, 96 * width, 3, 3), (1, 1537), (1000, 16 * width)]
    weights = [torch.randn(shape).to(device) for shape in shapes]
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    return weights, [0] * len(weights)


@pytest.mark.parametrize("width", [1, 8])
def test_spectral_norm_of_long_layers(width, device):
    weights, dims = critic_weights(device, width)
    us, vs = random_vectors(weights, dims)
    exact_us, exact_vs = double(us), double(vs)
    actual = norm_kernels.update(weights, us, vs, dims, 1, 1e-12)
    exact = norm_reference.update(double(weights), exact_us, exact_vs, dims, 1, 1e-12)
    plain = [e.float() for e in exact]
    assert_accurate(actual, plain, exact, torch.float32)
    grads = [torch.randn_like(w) for w in weights]
    exact = norm_reference.scale_bwd(double(grads), double(weights), *(t.double() for t in actual), dims)
    plain = norm_reference.scale_bwd(grads, weights, *actual, dims)
    assert_accurate(norm_kernels.scale_bwd(grads, weights, *actual, dims), plain, exact, torch.float32)


def test_no_race_in_the_sums_over_programs(device):
    """The last program of a layer adds what the others stored: a store it did not see would show as a difference."""
    weights, dims = critic_weights(device, 8 if device == "cuda" else 1)
    us, vs = random_vectors(weights, dims)
    grads = [torch.randn_like(w) for w in weights]

    def run():
        vectors = norm_kernels.update(weights, [u.clone() for u in us], [v.clone() for v in vs], dims, 2, 1e-12)
        return [*vectors, *norm_kernels.scale_bwd_bwd(grads, grads, weights, *vectors, dims)]

    first = run()
    for _ in range(100 if device == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_captured_spectral_norm_outlives_the_tables_of_eager_calls(device, monkeypatch):
    monkeypatch.setattr(spectral_norm_plan, "_TABLES", 2)
    weights, dims = critic_weights(device)
    parameters = [w.requires_grad_() for w in weights]
    us, vs = random_vectors(weights, dims)
    kept = [t.clone() for t in (*us, *vs)]
    grads = [torch.randn_like(w) for w in weights]

    def step():
        vectors = spectral_norm_update(parameters, us, vs, dims)
        scaled = spectral_norm_scale(parameters, *vectors, dims)
        return [*scaled, *torch.autograd.grad(scaled, parameters, grads)]

    replay = captured(step)
    for _ in range(4):  # drops the tables of the warm-up, and writes over the memory they had
        others = [torch.randn_like(w) for w in weights]
        norm_kernels.scale(others, *norm_kernels.update(others, us, vs, dims, 1, 1e-12), dims, torch.float32)
    torch.full((1 << 16,), -1, dtype=torch.int64, device=device)
    with torch.no_grad():
        for t, value in zip((*us, *vs), kept, strict=True):
            t.copy_(value)
        for weight in weights:
            weight.mul_(-2)
    results = [[t.clone() for t in replay()] for _ in range(2)]
    for t, value in zip((*us, *vs), kept, strict=True):
        t.copy_(value)
    for replayed in results:
        for a, b in zip(replayed, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_two_streams_normalize_the_same_weights(device):
    """An evaluation beside a train step: same weights, same addresses, programs of both on the device at once."""
    weights, dims = critic_weights(device)
    us, vs = random_vectors(weights, dims)
    expected = norm_kernels.update(weights, us, vs, dims, 0, 1e-12)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(norm_kernels.update(weights, us, vs, dims, 0, 1e-12))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
def test_captured_attention(layout, device):
    q, k, v = block_operands(2, 16 if device == "cuda" else 4, 64, torch.float32, layout, device)
    run = functools.partial(attention, impl="triton")
    seed = torch.Generator(device).manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=seed, device=device) for x in (q[..., :1].expand(-1, -1, 32), q, k, v)]

    def passes():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = run(*leaves)
        first = torch.autograd.grad(o, leaves, cotangents[0], create_graph=True)
        return [o.detach(), *torch.autograd.grad(first, leaves, cotangents[1:])]

    replay = captured(passes)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    for a, b in zip([t.clone() for t in replay()], passes(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_bitwise_repeatable_and_linear_in_memory(dtype, device):
    height = 64 if device == "cuda" else 4
    inputs = block_operands(4, height, 64, dtype, "channels-last", device)
    run = functools.partial(attention, impl="triton")
    first = three_passes(run, *inputs)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    for a, b in zip(three_passes(run, *inputs), first, strict=True):
        assert torch.equal(a, b)
    if device == "cuda":
        one_map = 4 * height**2 * (height**2 // 4) * dtype.itemsize
        assert torch.cuda.max_memory_allocated() - before < one_map / 2


@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
def test_opcheck_of_the_kernels(layout, device):
    q, k, v = (x.requires_grad_() for x in block_operands(2, 4, 24, torch.float32, layout, device))
    opcheck(attention_op, (q, k, v, 0.7, "triton"), rtol=1e-4, atol=1e-4)
    o, stats = (x.detach() for x in attention_op(q, k, v, 0.7, "triton"))
    grad_o = torch.randn_like(o).requires_grad_()
    opcheck(attention_bwd_op, (grad_o, q, k, v, o, stats, 0.7, "triton"), rtol=1e-4, atol=1e-4)
    plain = [x.detach() for x in (q, k, v, grad_o, q, k, v)]
    opcheck(attention_bwd_bwd_op, (*plain, o, stats, 0.7, "triton"))
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    x = torch.randn(2, 8, 4, 6, device=device).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = torch.randn(6, 8, device=device).requires_grad_(), torch.randn(6, device=device).requires_grad_()
    opcheck(pooled_projection_op, (x, weight, bias, 2, "triton"), rtol=1e-4, atol=1e-4)
    rows, out = torch.randn(2, 24, 4, device=device).requires_grad_(), torch.randn(8, 4, device=device).requires_grad_()
    opcheck(projection_residual_op, (rows, out, None, x, "triton"), rtol=1e-4, atol=1e-4)


def test_compiled_kernels_are_looked_at(device):
    attention(*block_operands(1, 4, 16, torch.float32, "channels-last", device), impl="triton")
    assert bool(launching._seen) == (device == "cuda")
    assert all(isinstance(compiled.n_spills, int) and "cubin" in compiled.asm for compiled in launching._seen)


class Critic(nn.Module):
    """Both families of kernels, in a network that torch.compile may hold in CUDA graphs."""

    def __init__(self, impl):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.attention = SelfAttention2d(16, impl=impl)
        nn.init.constant_(self.attention.gamma, 0.5)
        self.last = nn.Linear(16, 1)
        group_spectral_norm(self, impl=impl)

    def forward(self, x):
        return self.last(self.attention(self.first(x).relu()).mean(dim=(2, 3)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_critic(mode, device):
    torch.manual_seed(0)
    ours = Critic("triton").to(device)
    torch.manual_seed(0)
    plain = Critic("reference").to(device)
    plain.load_state_dict(ours.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(ours, mode=mode, backend="inductor" if device == "cuda" else "aot_eager")
    for step in range(4):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(device)
        losses = []
        for network in (compiled, plain):
            torch.compiler.cudagraph_mark_step_begin()
            network.zero_grad()
            network(x).square().mean().backward()
            losses.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        for a, b in zip(*losses, strict=True):
            torch.testing.assert_close(a, b, rtol=5e-3, atol=1e-4)  # convolutions may round to TF32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    weights, dims = critic_weights("cuda:1")
    us, vs = random_vectors(weights, dims)
    u, _, sigma = spectral_norm_update(weights, us, vs, dims)
    x = torch.randn(2, 16, 8, 8, device="cuda:1", requires_grad=True)
    SelfAttention2d(16, impl="triton").to("cuda:1")(x).sum().backward()
    assert torch.cuda.current_device() == 0
    assert u.device == sigma.device == x.grad.device == torch.device("cuda:1")
    assert x.grad.isfinite().all()
