"""The C++ spectral norms of many weights on a CPU against the reference."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastgan import backend
from fastgan.nn import group_spectral_norm
from fastgan.ops import spectral_norm_scale, spectral_norm_update
from fastgan.reference import spectral_norm as reference
from tests.accuracy import assert_as_accurate
from tests.extension.checks import assert_same_for_any_number_of_threads

pytestmark = pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")

if not backend.extension_missing():
    from fastgan.extension import spectral_norm as extension

# An iteration is summed in one part for most of these shapes, and in two for the last.
SHAPES = [(5, 3), (64, 3, 3, 3), (130, 64, 3, 3), (7, 9, 4, 4), (1, 300), (20, 30, 1, 1), (133, 999)]
DIMS = [0, 0, 0, 1, 0, 1, 0]


def operands(shapes, dims, dtype):
    weights = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    wide = reference.compute_dtype(weights[0])
    rows = [shape[dim] for shape, dim in zip(shapes, dims, strict=True)]
    us, vs = (
        [torch.randn(size, dtype=wide) for size in sizes]
        for sizes in (rows, [math.prod(s) // r for s, r in zip(shapes, rows, strict=True)])
    )
    return weights, us, vs


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 24), min_size=2, max_size=4), min_size=1, max_size=4),
    st.data(),
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_random_networks_equal_the_reference_in_float64(shapes, data, iterations, v_first, seed):
    torch.manual_seed(seed)
    dims = [data.draw(st.integers(0, len(shape) - 1)) for shape in shapes]
    weights, us, vs = operands(shapes, dims, torch.float64)
    other = [[x.clone() for x in xs] for xs in (us, vs)]
    ours = extension.update(weights, us, vs, dims, iterations, 1e-12, v_first)
    theirs = reference.update(weights, *other, dims, iterations, 1e-12, v_first)
    for a, b in zip([*ours, *us, *vs], [*theirs, *other[0], *other[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    grads, grad_grads = ([torch.randn_like(w) for w in weights] for _ in range(2))
    u, v, _ = theirs
    sigma = torch.rand(len(weights), dtype=torch.float64) + 0.5  # a sigma near zero would magnify rounding
    for name, args in (("scale", ()), ("scale_bwd", (grads,)), ("scale_bwd_bwd", (grad_grads, grads))):
        last = (torch.float64,) if name == "scale" else ()
        results = (getattr(module, name)(*args, weights, u, v, sigma, dims, *last) for module in (extension, reference))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_pass_is_as_accurate_as_the_reference(dtype, out):
    weights, us, vs = operands(SHAPES, DIMS, dtype)
    wide = [[x.double() for x in xs] for xs in (weights, us, vs)]
    copies = [[x.clone() for x in xs] for xs in (us, vs)]
    ours, plain = extension.update(weights, us, vs, DIMS, 1, 1e-12), reference.update(weights, *copies, DIMS, 1, 1e-12)
    u, v, sigma = truth = reference.update(*wide, DIMS, 1, 1e-12)
    for a, p, t, name in zip(ours, plain, truth, ("u", "v", "sigma"), strict=True):
        assert_as_accurate(a, p, t, name)
    grads, grad_grads = [torch.randn_like(w, dtype=out) for w in weights], [torch.randn_like(w) for w in weights]
    narrow = [x.float() for x in (u, v, sigma)]
    wide_weights, wide_grads, wide_grad_grads = ([x.double() for x in xs] for xs in (weights, grads, grad_grads))
    exact = [x.double() for x in narrow]
    for name, args, wide_args in (
        ("scale", (weights,), (wide_weights,)),
        ("scale_bwd", (grads, weights), (wide_grads, wide_weights)),
        ("scale_bwd_bwd", (grad_grads, grads, weights), (wide_grad_grads, wide_grads, wide_weights)),
    ):
        last, wide_last = ((out,), (torch.float64,)) if name == "scale" else ((), ())
        ours, plain = (getattr(module, name)(*args, *narrow, DIMS, *last) for module in (extension, reference))
        truth = getattr(reference, name)(*wide_args, *exact, DIMS, *wide_last)
        for a, p, t in zip(ours, plain, truth, strict=True):
            assert a.dtype == p.dtype
            assert a.stride() == p.stride()
            assert_as_accurate(a, p, t, name)


def test_gradients_of_both_orders_match_finite_differences():
    weights, us, vs = operands([(3, 2), (2, 3, 2, 1)], [0, 1], torch.float64)
    vectors = spectral_norm_update(weights, us, vs, [0, 1], 3)

    def scaled(*weights):
        u, v = vectors[:2]  # sigma is a function of the weights, which finite differences must see
        parts = reference.split_vectors(u, v, weights, [0, 1])
        sigma = torch.stack(
            [torch.dot(a, reference.as_matrix(w, d) @ b) for w, (a, b), d in zip(weights, parts, [0, 1], strict=True)]
        )
        return tuple(spectral_norm_scale(list(weights), u, v, sigma.detach(), [0, 1], impl="extension"))

    inputs = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(scaled, inputs)
    assert torch.autograd.gradgradcheck(scaled, inputs)


@pytest.mark.parametrize("factor", [1e-35, 1e-9, 1e9, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_the_weights_does_not_matter(factor, dtype):
    """W^T W v would leave float32's range."""
    weights, us, vs = operands(SHAPES, DIMS, dtype)
    wide = [[x.double().clone() for x in xs] for xs in (weights, us, vs)]
    scaled = [weight * factor for weight in weights]
    u, v, sigma = extension.update(scaled, us, vs, DIMS, 2, 1e-37)
    true_u, true_v, true_sigma = reference.update(*wide, DIMS, 2, 1e-37)
    for ours, truth in ((u, true_u), (v, true_v), (sigma / factor, true_sigma)):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30, 1e-30])
def test_extreme_weights_as_in_float64(value):
    """Squares of 1e30 and 1e-30 have no place in float32; norms of such vectors do."""
    weights, us, vs = operands(SHAPES, DIMS, torch.float32)
    weights[1].fill_(value)
    weights[2][3, 4, 1, 1] = value
    wide = [[x.double() for x in xs] for xs in (weights, us, vs)]
    ours, truth = extension.update(weights, us, vs, DIMS, 1, 1e-37), reference.update(*wide, DIMS, 1, 1e-37)
    for a, b in zip([*ours, *us, *vs], [*truth, *wide[1], *wide[2]], strict=True):
        torch.testing.assert_close(a.double(), b, equal_nan=True, rtol=1e-4, atol=1e-5)


def in_memory(x, order, gap=False):
    """``x`` with its dimensions in another order of memory, from the slowest to the fastest; with gaps if asked."""
    moved = x.permute(order).contiguous()
    if gap:
        moved = torch.stack((moved, moved), dim=-1)[..., 0]
    return moved.permute([order.index(d) for d in range(x.ndim)])


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(0, 2), st.booleans(), st.sampled_from([torch.float64, torch.float32]))
def test_weights_and_gradients_in_any_order_of_memory(data, iterations, v_first, dtype):
    shapes = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=3))
    dims = [data.draw(st.integers(0, len(shape) - 1)) for shape in shapes]
    gaps = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    weights, us, vs = operands(shapes, dims, torch.float64)

    def stored(xs):
        return [in_memory(x, data.draw(st.permutations(range(x.ndim))), gaps and i == 0) for i, x in enumerate(xs)]

    grads, grad_grads = ([torch.randn_like(w) for w in weights] for _ in range(2))
    ours = [stored(xs) for xs in (weights, grads, grad_grads)]
    if dtype == torch.float32:  # memory of another width; the values are those of float64 within float32's accuracy
        ours, us, vs = [[x.float() for x in xs] for xs in ours], [u.float() for u in us], [v.float() for v in vs]
        weights, grads, grad_grads = ([x.float().double() for x in xs] for xs in (weights, grads, grad_grads))
    wide = [[x.double().clone() for x in xs] for xs in (us, vs)]
    found = extension.update(ours[0], us, vs, dims, 0, 1e-12, v_first)[2].double()
    expected = reference.update(weights, *wide, dims, 0, 1e-12, v_first)[2]
    near = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found, expected, **near)
    if dtype == torch.float64:
        extension.update(ours[0], us, vs, dims, iterations, 1e-12, v_first)
        reference.update(weights, *wide, dims, iterations, 1e-12, v_first)
        for a, b in zip([*us, *vs], [*wide[0], *wide[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    u, v, sigma = torch.cat(us), torch.cat(vs), torch.rand(len(weights), dtype=dtype) + 0.5
    exact = [x.double() for x in (u, v, sigma)]
    for name, count in (("scale", 1), ("scale_bwd", 2), ("scale_bwd_bwd", 3)):
        narrow, truths = ours[:count][::-1], [weights, grads, grad_grads][:count][::-1]
        last = [(dtype,), (torch.float64,)] if name == "scale" else [(), ()]
        results = getattr(extension, name)(*narrow, u, v, sigma, dims, *last[0])
        for i, (a, b) in enumerate(
            zip(results, getattr(reference, name)(*truths, *exact, dims, *last[1]), strict=True)
        ):
            assert a.stride() == torch.empty_like(ours[0][i % len(weights)]).stride()
            torch.testing.assert_close(a.double(), b, **near)


def test_outputs_share_no_memory_and_keep_it_as_long_as_anything_uses_it():
    weights, us, vs = operands([(300, 400), (300, 400)], [0, 0], torch.float32)
    vectors = extension.update(weights, us, vs, [0, 0], 1, 1e-12)
    backend.release_memory()

    def scaled(factor):
        return extension.scale([w * factor for w in weights], *vectors, [0, 0], torch.float32)

    first = scaled(1)
    view, storage, array = first[0][1:2, ::7], first[0].untyped_storage(), first[1].numpy()
    expected, address = [w.clone() for w in first], {w.data_ptr() for w in first}
    del first
    kept = scaled(2)  # of a view, a storage and an array, none may be overwritten
    assert not address & {w.data_ptr() for w in kept}
    assert torch.equal(view, expected[0][1:2, ::7])
    assert torch.equal(torch.empty(0).set_(storage, 0, (300, 400)), expected[0])
    assert torch.equal(torch.from_numpy(array), expected[1])
    torch.testing.assert_close(kept, [2 * w for w in expected])
    del view, storage, array
    assert address == {w.data_ptr() for w in scaled(3)}  # nothing held them any more
    del kept
    assert backend.release_memory() == 4 * 4 * 300 * 400
    assert backend.release_memory() == 0


def test_memory_that_autograd_has_saved_is_not_used_again():
    weights, us, vs = operands([(300, 400)], [0], torch.float32)
    vectors = spectral_norm_update(weights, us, vs, impl="extension")
    w = weights[0].requires_grad_()
    x = torch.randn(5, 400, requires_grad=True)
    y = x @ spectral_norm_scale([w], *vectors, impl="extension")[0].T  # saves the weight for the gradient of x
    for _ in range(3):
        spectral_norm_scale([w.detach() * 7], *vectors, impl="extension")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = (w.detach() / vectors[2]).sum(dim=0).expand(5, -1)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)


def test_memory_is_used_again_from_many_threads():
    weights, us, vs = operands([(200, 300)] * 3, [0] * 3, torch.float32)
    vectors = extension.update(weights, us, vs, [0] * 3, 1, 1e-12)
    expected = extension.scale(weights, *vectors, [0] * 3, torch.float32)

    def work(_):
        results = []
        for _ in range(20):
            results = [*results[-2:], extension.scale(weights, *vectors, [0] * 3, torch.float32)]
            assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.slow
@pytest.mark.parametrize(("megabytes", "printed"), [("0", "0"), ("1", "640000"), ("many", "")])
def test_the_environment_limits_unused_memory(megabytes, printed):
    code = (
        "import torch; from fastgan import backend; from fastgan.extension import spectral_norm as s;"
        "w = [torch.ones(400, 400)] * 3; v = torch.ones(1200); sigma = torch.ones(3);"
        "out = s.scale(w, v, v, sigma, [0] * 3, torch.float32); del out; print(backend.release_memory())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FASTGAN_CPU_CACHE_MB": megabytes},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == printed
    assert bool(run.returncode) == ("FASTGAN_CPU_CACHE_MB must be a number of megabytes, got many" in run.stderr)
    assert bool(run.returncode) == (not printed)


def test_results_do_not_depend_on_the_number_of_threads():
    weights, us, vs = operands(SHAPES, DIMS, torch.float32)
    grads = [torch.randn_like(w) for w in weights]

    def run():
        vectors = extension.update(weights, [u.clone() for u in us], [v.clone() for v in vs], DIMS, 2, 1e-12)
        return [*vectors, *extension.scale_bwd_bwd(grads, grads, weights, *vectors, DIMS)]

    assert_same_for_any_number_of_threads(run)


def test_a_grouped_network_equals_the_reference_through_a_penalty():
    def network(impl):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 4), nn.Flatten(), nn.Linear(4 * 49, 1)
        return group_spectral_norm(nn.Sequential(*layers).double(), impl=impl)

    results = []
    for impl in ("extension", "reference"):
        critic, x = (
            network(impl),
            torch.linspace(-1, 1, 2 * 3 * 36, dtype=torch.float64).view(2, 3, 6, 6).requires_grad_(),
        )
        y = critic(x).sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        results.append(torch.autograd.grad(y + grad.square().sum(), list(critic.parameters()), allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
