"""The C++ spectral norms of many weights on a CPU against the reference."""

import math

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


def test_weights_that_are_not_contiguous_go_to_the_reference():
    weights, us, vs = operands(SHAPES, DIMS, torch.float32)
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        extension.update(weights, us, vs, DIMS, 0, 1e-12)[2], reference.update(weights, us, vs, DIMS, 0, 1e-12)[2]
    )
    (scaled,) = extension.scale(weights[1:2], *(x[:1] for x in (us[1], vs[1], torch.ones(1))), [0], torch.float32)
    assert scaled.stride() == weights[1].stride()


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
