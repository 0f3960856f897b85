import functools

import pytest
import torch
from torch.library import opcheck

from fastgan import backend
from fastgan.ops import _attention as attention_ops
from fastgan.ops import attention
from fastgan.ops._attention import SMALL_MAPS, attention_bwd_bwd_op, attention_bwd_op, attention_op
from fastgan.reference.attention import attention_bwd, attention_bwd_bwd, attention_eager, attention_fwd
from tests.accuracy import assert_as_accurate
from tests.ops.operands import operands, three_passes
from tests.peak_bytes import PeakBytes

blockwise = functools.partial(attention, impl="reference")
SHAPES = [(2, 5, 4, 3, 6), (1, 1, 1, 1, 1), (3, 7, 1, 2, 2), (1, 4, 9, 8, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_both_orders_match_finite_differences(shape):
    inputs = operands(shape)

    def run(*x):
        return blockwise(*x, scale=0.7)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 33, 12, 20)])
def test_equals_eager_in_float64(shape, blocks, monkeypatch):
    if blocks == "many":
        monkeypatch.setattr("fastgan.reference.attention.BLOCK_BYTES", 3 * 8 * shape[2])
    inputs = operands(shape)
    fast = three_passes(lambda *x: blockwise(*x, scale=1.3), *inputs)
    slow = three_passes(lambda *x: attention_eager(*x, scale=1.3), *inputs)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_accurate_as_eager(dtype):
    inputs = operands((2, 65, 40, 16, 24), dtype)
    truth = three_passes(attention_eager, *(x.double() for x in inputs))
    plain = three_passes(attention_eager, *inputs)
    names = ("o", "dq", "dk", "dv", "d2q", "d2k", "d2v")
    for actual, p, t, name in zip(three_passes(blockwise, *inputs), plain, truth, names, strict=True):
        assert actual.dtype == dtype
        assert_as_accurate(actual, p, t, name)


def test_opcheck():
    q, k, v = operands((2, 5, 4, 3, 6))
    opcheck(attention_op, (q, k, v, 0.7, "reference"))
    o, stats = (x.detach() for x in attention_op(q, k, v, 0.7, "reference"))
    grad_o = torch.randn_like(o).requires_grad_()
    opcheck(attention_bwd_op, (grad_o, q, k, v, o, stats, 0.7, "reference"))
    plain = [x.detach() for x in (q, k, v, grad_o, q, k, v)]
    opcheck(attention_bwd_bwd_op, (*plain, o, stats, 0.7, "reference"))


@pytest.fixture
def auto_is_triton(monkeypatch):
    """Run the kernels, as on a GPU."""

    def resolve(impl, tensor):
        return "triton" if impl == "auto" else right(impl, tensor)

    right = backend.resolve
    backend.warn_anew.cache_clear()
    monkeypatch.setattr(backend, "resolve", resolve)
    monkeypatch.setattr(attention_ops, "resolve", resolve)
    monkeypatch.setattr(attention_ops, "SMALL_MAPS", 0)
    yield
    backend.warn_anew.cache_clear()


@pytest.mark.parametrize(("d", "e"), [(136, 8), (8, 264)])
def test_more_channels_than_kernels_take_run_by_the_reference_with_one_warning(auto_is_triton, d, e):
    q, k, v = operands((1, 4, 3, d, e), torch.float32)
    with pytest.warns(backend.BackendWarning, match="attention runs its reference path: . must have at most") as caught:
        outputs = [torch.compile(attention, fullgraph=True, backend="eager")(q, k, v), attention(q, k, v)]
    assert len([w for w in caught if w.category is backend.BackendWarning]) == 1
    for output in outputs:
        torch.testing.assert_close(output, attention_eager(q, k, v))


def test_without_the_extension_small_maps_are_kept_on_a_cpu_and_large_ones_recomputed(monkeypatch):
    monkeypatch.setattr(attention_ops, "resolve", lambda impl, tensor: "reference")

    def graph(rows):
        q = torch.zeros(1, rows, 1, requires_grad=True)
        keys = torch.zeros(1, SMALL_MAPS // 4 // 64, 1)
        return type(attention(q, keys, keys).grad_fn).__name__

    assert "fastgan" not in graph(64)
    assert "fastgan_attention" in graph(65)


def test_third_order_is_refused_not_wrong():
    q, k, v = operands((1, 3, 2, 2, 2))
    (first,) = torch.autograd.grad(blockwise(q, k, v).sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention has gradients to second order; use impl='eager'"):
        torch.autograd.grad(second.sum(), q)


def test_compiled_gradients_equal_eager():
    q, k, v = operands((2, 6, 5, 4, 3))

    def loss(q, k, v):
        return blockwise(q, k, v).square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_strided_operands_need_no_contiguity_and_outputs_keep_their_layout(impl):
    run = functools.partial(attention, impl=impl)
    b, n, m, d, e = 2, 12, 9, 4, 6
    q, k = torch.randn(b, d, n, dtype=torch.float64).mT, torch.randn(m, b, d, dtype=torch.float64).transpose(0, 1)
    v = torch.randn(b, e, 2 * m, dtype=torch.float64)[:, :, ::2].mT
    fast = three_passes(run, q, k, v)
    slow = three_passes(attention_eager, q, k, v)
    for a, b_ in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b_, rtol=1e-11, atol=1e-12)
    assert fast[0].mT.is_contiguous()
    assert run(q.contiguous(), k, v).is_contiguous()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("alone", [0, 1, 2])
def test_a_batch_of_one_is_broadcast(alone, impl):
    run = functools.partial(attention, impl=impl)
    inputs = operands((3, 5, 4, 2, 3))
    inputs[alone] = inputs[alone][:1].detach().requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    expected = run(*(x.expand(3, -1, -1).contiguous() for x in inputs))
    torch.testing.assert_close(run(*inputs), expected)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("b", "n"), [(0, 3), (2, 0)])
def test_empty_batches_and_queries(b, n, impl):
    inputs = operands((b, n, 4, 2, 3))
    o, *gradients = three_passes(functools.partial(attention, impl=impl), *inputs)
    assert o.shape == (b, n, 3)
    for g in gradients:
        assert g.count_nonzero() == 0


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_extreme_values(impl):
    run = functools.partial(attention, impl=impl)
    q, k, v = operands((1, 4, 5, 3, 2), torch.float32, requires_grad=False)
    large = three_passes(run, 1e4 * q, 1e4 * k, v)
    assert all(x.isfinite().all() for x in large)
    equal = run(q, k[:, :1].expand(-1, 5, -1), v)
    torch.testing.assert_close(equal, v.mean(dim=1, keepdim=True).expand(-1, 4, -1))
    single = run(q, k[:, :1], v[:, :1])
    torch.testing.assert_close(single, v[:, :1].expand(-1, 4, -1))
    q[0, 2, 1] = float("nan")
    o = run(q, k, v)
    assert o[0, 2].isnan().all()
    assert o[0, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_autocast_computes_in_the_lower_dtype(impl):
    q, k, v = operands((1, 4, 5, 3, 2), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(q, k, v, impl=impl)
    assert o.dtype == torch.bfloat16
    o.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q must have 3 dimensions"),
        (lambda q, k, v: (q, k[..., :1], v), "k must have the channels d of q"),
        (lambda q, k, v: (q, k, v[:, :2]), "v must have as many rows M as k"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "k must have at least one key"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v), "q and v must have at least one channel"),
        (lambda q, k, v: (q, torch.cat([k, k[:1]]), torch.cat([v, v[:1]])), "same batch size B"),
        (lambda q, k, v: (q, k.float(), v), "k must have the dtype of q"),
        (lambda q, k, v: (q.int(), k, v), "q must have dtype float32"),
        (lambda q, k, v: (q, k, v.to("meta")), "v must be on the device of q"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*operands((2, 5, 4, 3, 6), requires_grad=False)))


def test_bad_impl():
    with pytest.raises(ValueError, match="impl must be one of"):
        attention(*operands((1, 2, 2, 2, 2)), impl="cuda")
    with pytest.raises(ValueError, match="float32, bfloat16 and float16"):
        attention(*operands((1, 2, 2, 2, 2)), impl="triton")
    with pytest.raises(TypeError, match="k must be a torch.Tensor"):
        attention(torch.ones(1, 2, 2), None, torch.ones(1, 2, 2))
    with pytest.raises(TypeError, match="scale must be a number, got a tensor: multiply q by it"):
        attention(*operands((1, 2, 2, 2, 2)), scale=torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        attention(*operands((1, 2, 2, 2, 2)), scale=float("nan"))


def test_on_a_cpu_too_no_map_is_kept():
    """The most bytes alive at N = M = 4096, batch 4, against the 268 MB of the maps, which eager attention keeps."""
    qkv, maps = operands((4, 4096, 4096, 8, 32), torch.float32, requires_grad=False), 4 * 4 * 4096 * 4096
    with PeakBytes() as memory:
        attention_eager(*qkv)
    assert memory.peak >= maps
    with PeakBytes() as memory:
        o, stats = attention_fwd(*qkv, 1.0)
        attention_bwd(o, *qkv, o, stats, 1.0)
        attention_bwd_bwd(*qkv, o, *qkv, o, stats, 1.0)
    assert memory.peak < maps / 4
