import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastgan import backend
from fastgan.linalg import nuclear_norm
from fastgan.linalg._nuclear_norm import nuclear_norm as op
from fastgan.linalg._nuclear_norm import nuclear_norm_bwd, polar_bounds, polar_factor
from tests.linalg.spectra import IMPLS, SPECTRA, TOLERANCE, factor, relative_error, rotation, spectrum

METHODS = ("auto", "svd", "gram", "polar")


def with_singular_values(sigma, cols):
    rows = len(sigma)
    return rotation(rows) @ torch.diag(sigma) @ rotation(cols)[:rows]


def truth_of(m):
    return torch.linalg.svdvals(m.double()).sum(-1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_sum_of_singular_values(dtype, impl):
    for name in SPECTRA:
        for rows, cols in ((1, 1), (1, 4), (3, 3), (31, 64), (64, 31)):
            m = with_singular_values(spectrum(name, min(rows, cols)), max(rows, cols)).to(dtype)
            m = m if rows <= cols else m.mT
            for method in ("auto", "svd", "polar"):
                value, info = nuclear_norm(m, method=method, impl=impl, return_info=True)
                assert value.dtype == dtype
                assert relative_error(value, truth_of(m)) < TOLERANCE[dtype] / 10, (name, rows, cols, method)
                assert info.lower <= truth_of(m) <= info.upper, (name, rows, cols, method)


def test_bounds_widen_if_eigenvalues_of_the_gram_matrix_lose_digits():
    m = with_singular_values(torch.tensor([1.0, 1e-3, 1e-10, 0.0]).double(), 7)
    careless, careless_info = nuclear_norm(m, method="gram", return_info=True)
    value, info = nuclear_norm(m, return_info=True)
    assert careless_info.error_bound > 1e-9
    assert careless_info.lower <= truth_of(m) <= careless_info.upper
    assert (careless_info.method, info.method) == ("gram", "svd")
    assert relative_error(value, truth_of(m)) < 1e-14
    assert relative_error(careless, truth_of(m)) < 1e-6


def polar_cases():
    torch.manual_seed(0)
    m = torch.stack([factor(name, 31) @ factor("geometric", 31) for name in SPECTRA])
    m[0] = 0
    return m


@pytest.mark.parametrize("low_precision", [False, True])
def test_polar_factor_equals_that_of_the_singular_vectors(low_precision):
    polar, report = polar_factor(polar_cases(), low_precision, 1e-5 if low_precision else 1e-10, "auto")
    torch.testing.assert_close(report[:, 0], truth_of(polar_cases()), rtol=1e-9, atol=0)
    assert (report[:, 2] > 0).all()
    assert torch.linalg.matrix_norm(polar, 2).max() < 1 + 1e-6
    m = with_singular_values(torch.logspace(0, -5, 8, dtype=torch.float64), 12)[None]
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    polar, _ = polar_factor(m, low_precision, 0.0, "auto")
    torch.testing.assert_close(polar, u @ vh, rtol=0, atol=1e-9)  # rounding over the smallest singular value


@pytest.mark.gpu
@pytest.mark.skipif(bool(backend.extension_missing("cuda")), reason="the CUDA half is not built")
@pytest.mark.parametrize("low_precision", [False, True])
def test_extension_takes_the_steps_of_the_reference(low_precision):
    m = polar_cases().cuda()
    u, report = polar_factor(m, low_precision, 1e-5 if low_precision else 1e-10, "extension")
    expected_u, expected = polar_factor(m, low_precision, 1e-5 if low_precision else 1e-10, "reference")
    assert u.shape == expected_u.shape
    assert torch.equal(report[:, 2], expected[:, 2])
    torch.testing.assert_close(report[:, 0], expected[:, 0], rtol=1e-9, atol=0)


def test_a_finished_matrix_is_left_alone_while_others_go_on():
    easy, hard = torch.eye(12).double(), with_singular_values(10.0 ** -torch.arange(12).double(), 12)
    alone, _ = polar_factor(easy[None], False, 1e-10, "auto")
    together, report = polar_factor(torch.stack([easy, hard]), False, 1e-10, "auto")
    assert report[0, 2] < report[1, 2]
    torch.testing.assert_close(alone[0], together[0], rtol=0, atol=1e-14)  # one step more would bring it to 1 exactly


def test_bounds_hold_for_any_approximate_factor():
    m = torch.randn(5, 8, 12, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    for noise in (0, 1e-9, 1e-3, 1.0, 1e3):
        lower, upper = polar_bounds(m, u @ vh + noise * torch.randn(5, 8, 12, dtype=torch.float64))
        assert (lower <= truth_of(m)).all()
        assert (truth_of(m) <= upper).all()
        if noise <= 1e-9:
            assert ((upper - lower) < 1e-7 * lower).all()


@pytest.mark.parametrize("method", METHODS)
def test_extreme_scales_zero_and_empty_batches(method):
    m = torch.randn(4, 6, dtype=torch.float64)
    for scale in (1e-300, 1e-12, 1e12, 1e300):
        assert relative_error(nuclear_norm(m * scale, method=method) / scale, truth_of(m)) < 1e-13
    assert nuclear_norm(torch.zeros(3, 5), method=method).item() == 0
    assert nuclear_norm(torch.zeros(0, 3, 5), method=method).shape == (0,)
    assert nuclear_norm(torch.randn(2, 3, 4, 5), method=method).shape == (2, 3)


@pytest.mark.parametrize(("shape", "method"), [((2, 3, 5), "polar"), ((4, 4), "svd"), ((6, 3), "auto")])
def test_gradients(shape, method):
    m = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda m: nuclear_norm(m, method=method), (m,))
    assert gradgradcheck(lambda m: nuclear_norm(m, method=method), (m,))


def test_gradient_is_the_polar_factor_and_finite_for_singular_matrices():
    m = (torch.randn(6, 2).double() @ torch.randn(2, 5).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(m), m, create_graph=True)
    u, _, vh = torch.linalg.svd(m.detach())
    torch.testing.assert_close(gradient, u[:, :2] @ vh[:2], rtol=0, atol=1e-12)
    (second,) = torch.autograd.grad(gradient.square().sum(), m)
    zero = torch.zeros(3, 3, requires_grad=True)
    (zero_gradient,) = torch.autograd.grad(nuclear_norm(zero), zero)
    assert second.isfinite().all()
    assert torch.equal(zero_gradient, torch.zeros(3, 3))


@pytest.mark.slow
def test_opcheck():
    m = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(op, (m, "polar", "auto", True))
    torch.library.opcheck(nuclear_norm_bwd, (torch.randn(2, dtype=torch.float64).requires_grad_(), m))
    torch.library.opcheck(
        torch.ops.fastgan.nuclear_norm_bwd_bwd.default, (m.detach(), torch.ones(2).double(), m.detach())
    )


@pytest.mark.parametrize(
    ("m", "message"),
    [
        (torch.ones(3), r"m must have shape \(\.\.\., n, d\)"),
        (torch.ones(0, 3), r"m must have shape"),
        (torch.ones(2, 3, dtype=torch.int32), "m must have dtype float32, float64, got int32"),
        (torch.full((2, 2, 3), math.nan), "m, matrix 0 of the flattened batch, must be finite"),
        (torch.tensor([[1.0, math.inf]]), "m must be finite"),
    ],
)
def test_bad_input(m, message):
    with pytest.raises(ValueError, match=message):
        nuclear_norm(m)


def test_bad_options():
    with pytest.raises(ValueError, match="method must be one of 'auto', 'svd', 'gram', 'polar', got 'qr'"):
        nuclear_norm(torch.ones(2, 2), method="qr")
    with pytest.raises(TypeError, match="m must be a torch.Tensor, got list"):
        nuclear_norm([[1.0]])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cuda_equals_cpu(dtype):
    m = torch.stack([factor(name, 65) @ factor("repeated", 65) for name in SPECTRA]).to(dtype)
    value, info = nuclear_norm(m.cuda(), method="polar", return_info=True)
    assert relative_error(value.cpu(), truth_of(m)) < TOLERANCE[dtype] / 10
    assert (info.lower.cpu() <= truth_of(m)).all()
    assert (truth_of(m) <= info.upper.cpu()).all()


@pytest.mark.gpu
def test_polar_iteration_is_captured_in_a_cuda_graph():
    m = torch.randn(3, 65, 80, dtype=torch.float64, device="cuda")
    nuclear_norm(m, method="polar")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = nuclear_norm(m, method="polar")
    m.copy_(torch.randn_like(m))
    graph.replay()
    assert relative_error(value.cpu(), truth_of(m.cpu())) < 1e-10
