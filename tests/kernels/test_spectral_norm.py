"""The Triton kernels against float64; plain PyTorch in the same dtype sets the tolerance."""

import pytest
import torch

pytest.importorskip("triton")

from fastgan.kernels.spectral_norm import launch as kernels
from fastgan.kernels.spectral_norm import plan
from fastgan.kernels.spectral_norm.plan import TILES, layout_of, plan_for, table_of
from fastgan.reference import spectral_norm as reference
from tests.kernels.vectors import assert_accurate, double, random_vectors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights_and_dims(dtype, device):
    """Odd sizes, layers longer than a program's part either way, and every layout that a weight can have."""
    weights = [
        torch.randn(3, 4),
        torch.randn(5, 2, 3, 3),
        torch.randn(7, 6, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(515, 3),
        torch.randn(2, 2060),
        torch.randn(9, 4, 3, 2).transpose(0, 2),
        torch.randn(8, 8)[::2, 1:6],
        torch.randn(1, 40).t(),
        torch.randn(3, 5, 4, 2, 3).permute(0, 3, 1, 4, 2),
    ]
    return [w.to(device, dtype) for w in weights], [0, 1, 0, 0, 0, 3, 0, 0, 2]


def assert_same_layout(actual, weights):
    for a, w in zip(actual, weights, strict=True):
        assert a.shape == w.shape
        assert a.stride() == torch.empty_like(w).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_power_iterations", "v_first"), [(0, False), (2, False), (2, True)])
def test_update(dtype, n_power_iterations, v_first, device, poisoned_empty):
    weights, dims = weights_and_dims(dtype, device)
    us, vs = random_vectors(weights, dims)
    results, buffers = [], []
    for module, cast in ((kernels, list), (reference, list), (reference, double)):
        own_us, own_vs = cast([u.clone() for u in us]), cast([v.clone() for v in vs])
        results.append(module.update(cast(weights), own_us, own_vs, dims, n_power_iterations, 1e-12, v_first))
        buffers.append([*own_us, *own_vs])
    assert_accurate(*results, torch.float32)
    assert_accurate(*buffers, dtype)
    assert all(t.dtype == torch.float32 for t in results[0])
    if n_power_iterations == 0:
        assert all(torch.equal(a, b) for a, b in zip(buffers[0], [*us, *vs], strict=True))


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_scale_and_gradients(dtype, out_dtype, device, poisoned_empty):
    weights, dims = weights_and_dims(dtype, device)
    us, vs = random_vectors(weights, dims)
    vectors = reference.update(weights, us, vs, dims, 1, 1e-12)
    exact_vectors = double(vectors)
    grads = [torch.randn(w.shape, device=device).to(out_dtype) for w in weights]
    grad_grads = [torch.randn(w.shape, device=device).to(dtype) for w in weights]

    actual = kernels.scale(weights, *vectors, dims, out_dtype)
    plain = reference.scale(weights, *vectors, dims, out_dtype)
    exact = reference.scale(double(weights), *exact_vectors, dims, torch.float64)
    assert_accurate(actual, plain, exact, out_dtype)
    assert_same_layout(actual, weights)

    actual = kernels.scale_bwd(grads, weights, *vectors, dims)
    plain = reference.scale_bwd(grads, weights, *vectors, dims)
    exact = reference.scale_bwd(double(grads), double(weights), *exact_vectors, dims)
    sizes, negative = double(t.abs() for t in grads), double(-w.abs() for w in weights)
    u_v_sigma = [t.abs() for t in exact_vectors]
    assert_accurate(actual, plain, exact, dtype, reference.scale_bwd(sizes, negative, *u_v_sigma, dims))
    assert_same_layout(actual, weights)

    actual = kernels.scale_bwd_bwd(grad_grads, grads, weights, *vectors, dims)
    plain = reference.scale_bwd_bwd(grad_grads, grads, weights, *vectors, dims)
    exact = reference.scale_bwd_bwd(double(grad_grads), double(grads), double(weights), *exact_vectors, dims)
    magnitudes = reference.scale_bwd_bwd(double(t.abs() for t in grad_grads), sizes, negative, *u_v_sigma, dims)
    n = len(weights)
    assert_accurate(actual[:n], plain[:n], exact[:n], out_dtype, magnitudes[:n])
    assert_accurate(actual[n:], plain[n:], exact[n:], dtype, magnitudes[n:])


def test_a_weight_of_one_entry(device):
    """W / sigma is its sign, so its gradients are zero, to the rounding of the two terms that cancel."""
    weights = [torch.full((1, 1), -0.7, device=device)]
    ones = [torch.ones(1, device=device)]
    vectors = kernels.update(weights, ones, [torch.ones(1, device=device)], [0], 1, 1e-12)
    torch.testing.assert_close(kernels.scale(weights, *vectors, [0], torch.float32)[0].abs().item(), 1.0)
    grads = [torch.full((1, 1), 3.0, device=device)]
    assert kernels.scale_bwd(grads, weights, *vectors, [0])[0].abs().item() < 1e-6
    for d in kernels.scale_bwd_bwd(grads, grads, weights, *vectors, [0]):
        assert d.abs().item() < 1e-5


def test_expanded_gradient(device):
    weights, dims = weights_and_dims(torch.float32, device)
    vectors = reference.update(weights, *random_vectors(weights, dims), dims, 1, 1e-12)
    grads = [torch.ones((), device=device).expand(w.shape) for w in weights]
    for a, b in zip(
        kernels.scale_bwd(grads, weights, *vectors, dims),
        reference.scale_bwd(grads, weights, *vectors, dims),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-30, 1e30])
def test_extreme_weights_as_the_reference(value, v_first, device):
    weights = [torch.full((3, 5), value, device=device), torch.randn(4, 6, device=device)]
    us, vs = random_vectors(weights, [0, 0])
    results = []
    for module in (kernels, reference):
        own_us, own_vs = [u.clone() for u in us], [v.clone() for v in vs]
        module.update(weights, own_us, own_vs, [0, 0], 1, 1e-12, v_first)
        results.append((own_us[1], own_vs[1]))
        if value == 0 or value != value:
            assert torch.equal(own_us[0], us[0])
            assert torch.equal(own_vs[0], vs[0])
    torch.testing.assert_close(*results)


def test_results_are_reproducible(device):
    weights, dims = weights_and_dims(torch.float32, device)
    us, vs = random_vectors(weights, dims)
    runs = [kernels.update(weights, [u.clone() for u in us], [v.clone() for v in vs], dims, 1, 1e-12) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_pointer_table_is_reused_while_addresses_stay(device):
    a, b = torch.randn(3, device=device), torch.randn(4, device=device)
    assert table_of([a], [b]) is table_of([a], [b])
    assert table_of([a], [b]) is not table_of([b], [a])


def test_each_stream_has_its_table_and_a_capture_takes_one_away(device, monkeypatch):
    """The last row of a table counts programs: two streams that count in one row would add partial sums too early."""
    a, b = torch.randn(3, device=device), torch.randn(4, device=device)
    stream = 1
    monkeypatch.setattr(plan, "_stream_of", lambda _: stream)
    first = table_of([a], [b])
    stream = 2
    second = table_of([a], [b])
    assert second is not first
    assert second.pointers.data_ptr() != first.pointers.data_ptr()
    stream = 1
    assert table_of([a], [b]) is first
    monkeypatch.setattr(plan, "_is_capturing", lambda _: True)
    stream = 3
    taken = table_of([a], [b])
    assert taken is first  # the one used last
    monkeypatch.setattr(plan, "_is_capturing", lambda _: False)
    stream = 1
    assert table_of([a], [b]) is not taken
    stream = 2
    assert table_of([a], [b]) is second


def test_plan_is_reused_for_equal_layouts(device):
    first, second = (layout_of((4, 3, 2, 2), (12, 4, 2, 1), 1) for _ in range(2))
    assert plan_for((first,), torch.device(device)) is plan_for((second,), torch.device(device))


def test_one_long_layer_among_tiny_ones_is_spread_over_the_chip():
    """Split 20 million entries and forty weights of 64 evenly over 132 multiprocessors."""
    long, tiny = layout_of((1536, 1536 * 9), (1536 * 9, 1), 0), layout_of((8, 8), (8, 1), 0)
    plan = plan_for((*[tiny] * 20, long, *[tiny] * 20), torch.device("cpu"))
    entries = long.rows * long.columns
    for tiles, per_program in (
        (plan.s_tiles, TILES.block_r * TILES.chunk_c),
        (plan.t_tiles, TILES.block_c * TILES.chunk_r),
        (plan.tiles, TILES.tile_r * TILES.chunk_tile),
        (plan.flat_tiles, TILES.block_flat),
    ):
        on_long = int((tiles[:, 0] == 20).sum())
        assert len(tiles) == on_long + 40  # one program for each tiny weight
        assert on_long * per_program >= entries
        assert on_long >= 2 * 132
        assert per_program * 132 <= entries / 2  # so that the last program to end delays little
        assert len({tuple(tile) for tile in tiles.tolist()}) == len(tiles)


def test_layouts():
    assert layout_of((4, 3, 2, 2), (12, 4, 2, 1), 0).stride_b == 0  # contiguous columns are one level
    transposed = layout_of((4, 3, 2, 2), (12, 4, 2, 1), 1)
    assert (transposed.rows, transposed.columns, transposed.inner, transposed.stride_b) == (3, 16, 4, 12)
    assert layout_of((2, 3, 4, 5), (60, 1, 15, 3), 0) is not None  # channels last
    assert layout_of((2, 3, 4, 5), (60, 1, 3, 12), 0) is None  # three levels: the launcher makes a copy
