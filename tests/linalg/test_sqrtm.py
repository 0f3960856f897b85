import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastgan.linalg import sqrtm
from fastgan.linalg._sqrtm import lyapunov
from fastgan.linalg._sqrtm import sqrtm as op
from tests.linalg.spectra import IMPLS, SPECTRA, TOLERANCE, covariance, rotation, spectrum

METHODS = ("eigh", "newton_schulz")


def with_eigenvalues(values):
    q = rotation(len(values))
    return (q * values) @ q.mT, (q * values.sqrt()) @ q.mT


def error_of(root, truth):
    return (torch.linalg.norm(root.double() - truth) / torch.linalg.norm(truth)).item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_equals_the_root_in_the_eigenbasis(name, method, impl):
    for d in (1, 2, 31, 65):
        values = spectrum(name, d)
        a, truth = with_eigenvalues(values)
        root = sqrtm(a, method=method, impl=impl)
        assert torch.equal(root, root.mT)
        assert error_of(root, truth) < 1e-9, d
        if name not in ("singular", "geometric"):  # rounding to float32 alone moves their roots by 1e-4
            single = sqrtm(a.float(), method=method, impl=impl)
            assert single.dtype == torch.float32
            assert error_of(single, truth) < TOLERANCE[torch.float32], d


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS)
def test_inverse(method, impl):
    for values in (torch.ones(3), torch.logspace(0, -6, 31), torch.logspace(12, 10, 5), torch.tensor([1e-12])):
        a, _ = with_eigenvalues(values.double())
        inverse = sqrtm(a, inverse=True, method=method, impl=impl)
        product = inverse @ a @ inverse
        assert (product - torch.eye(len(values))).abs().max() < 1e-9
        assert torch.equal(inverse, inverse.mT)


@pytest.mark.parametrize("method", METHODS)
def test_scales_batches_and_layouts(method):
    a = covariance(2, 3, 7)
    root = sqrtm(a, method=method)
    assert root.shape == a.shape
    assert error_of(root @ root, a) < 1e-13
    for scale in (1e-300, 1e-12, 1e12, 1e300):
        torch.testing.assert_close(sqrtm(a * scale, method=method) / math.sqrt(scale), root, rtol=1e-10, atol=1e-12)
    transposed = sqrtm(a.mT.contiguous().mT.flip(0), method=method)
    torch.testing.assert_close(transposed, root.flip(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(sqrtm(torch.zeros(4, 4), method=method), torch.zeros(4, 4))
    assert sqrtm(torch.zeros(0, 4, 4), method=method).shape == (0, 4, 4)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method, inverse):
    a = covariance(2, 4).requires_grad_()
    assert gradcheck(lambda a: sqrtm(a, method=method, inverse=inverse), (a,))
    assert gradgradcheck(lambda a: sqrtm(a, method=method, inverse=inverse), (a,))


def test_gradients_with_repeated_and_zero_eigenvalues():
    identity = torch.eye(3).double().requires_grad_()
    assert gradcheck(sqrtm, (identity,))
    assert gradgradcheck(sqrtm, (identity,))
    for values in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0], [1.0, 1e-30]):
        a = with_eigenvalues(torch.tensor(values).double())[0].requires_grad_()
        (first,) = torch.autograd.grad(sqrtm(a).square().sum() + sqrtm(a).trace(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), a)
        assert first.isfinite().all()
        assert second.isfinite().all()
        assert first.abs().max() < 10


def test_gradient_solves_the_lyapunov_equation():
    a, grad = covariance(33).requires_grad_(), torch.randn(33, 33, dtype=torch.float64)
    root = sqrtm(a)
    (x,) = torch.autograd.grad(root, a, grad)
    torch.testing.assert_close(root @ x + x @ root, (grad + grad.mT) / 2, rtol=1e-11, atol=1e-11)
    assert torch.equal(x, x.mT) or (x - x.mT).abs().max() < 1e-14


def test_an_iteration_that_does_not_converge_says_so():
    a, _ = with_eigenvalues(torch.tensor([1.0, 0.5, -1e-6]).double())  # allowed as rounding, but it grows
    assert sqrtm(a).isfinite().all()
    with pytest.raises(RuntimeError, match=r"method='newton_schulz' did not converge \(residual .*\): use 'eigh'"):
        sqrtm(a, method="newton_schulz")


def test_eigenvectors_show_what_is_indefinite():
    a = covariance(9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sqrtm(a)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::linalg_eigh"] == 1
    assert "aten::linalg_cholesky_ex" not in counts
    with pytest.raises(ValueError, match=r"^a must be positive semi-definite: .* is -0\.5 of the largest"):
        op(torch.diag(torch.tensor([2.0, -1.0])), "eigh", False, "reference")  # as a compiled graph calls it


@pytest.mark.skipif(not hasattr(torch.linalg, "matrix_sqrth"), reason="torch.linalg.matrix_sqrth came with torch 2.14")
def test_equals_torch_if_that_is_defined():
    a = covariance(2, 31)
    torch.testing.assert_close(sqrtm(a), torch.linalg.matrix_sqrth(a), rtol=1e-12, atol=1e-13)
    low = torch.randn(31, 9, dtype=torch.float64)
    singular = low @ low.mT
    values, vectors = torch.linalg.eigh(low.mT @ low)
    thin = low @ vectors / values.sqrt()  # eigenvectors of the singular matrix, from those of the small one
    truth = (thin * values.sqrt()) @ thin.mT
    assert error_of(sqrtm(singular), truth) < 1e-12
    assert error_of(torch.linalg.matrix_sqrth(singular), truth) > 1e-10  # why it is not what sqrtm calls


@pytest.mark.slow
def test_opcheck():
    a = covariance(2, 3).requires_grad_()
    for inverse in (False, True):
        torch.library.opcheck(op, (a, "eigh", inverse, "auto"))
    torch.library.opcheck(lyapunov, (a, covariance(2, 3).requires_grad_()))


@pytest.mark.parametrize(
    ("a", "options", "message"),
    [
        (torch.ones(2, 3), {}, r"^a must have shape \(\.\.\., d, d\)"),
        (torch.ones(2, 2, dtype=torch.int64), {}, "^a must have dtype float32, float64, got int64"),
        (torch.full((2, 2), math.nan), {}, "^a must be finite"),
        (torch.tensor([[1.0, 0.1], [0.0, 1.0]]), {}, r"^a must be symmetric: max \|A - A\^T\| is 0\.1,"),
        (torch.diag(torch.tensor([2.0, -1.0])), {}, r"^a must be positive semi-definite: .* is -0\.5 of the largest"),
        (
            torch.eye(2).repeat(2, 1, 1) * torch.tensor([1.0, -1.0])[:, None, None],
            {},
            "^a, matrix 1 of .* must be positive",
        ),
        (torch.diag(torch.tensor([2.0, 0.0])), {"inverse": True}, "^a must be positive definite for inverse=True"),
        (torch.eye(2), {"method": "schur"}, "^method must be one of 'auto', 'eigh', 'newton_schulz', got 'schur'"),
    ],
)
def test_bad_input(a, options, message):
    with pytest.raises(ValueError, match=message):
        sqrtm(a, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_equals_cpu(method):
    a = covariance(3, 65)
    torch.testing.assert_close(sqrtm(a.cuda(), method=method).cpu(), sqrtm(a), rtol=1e-9, atol=1e-10)
