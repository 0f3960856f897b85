"""Gradients from matrix products alone, as on a GPU, against those from eigenvectors; here on a CPU."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from fastgan.linalg import nuclear_norm, sqrtm, trace_sqrt_product
from tests.linalg.spectra import covariance, factor, rotation, spectrum

EIGENSOLVERS = {"aten::_linalg_eigh", "aten::_linalg_svd"}


@pytest.fixture
def by_products(monkeypatch):
    def choose(value):
        for op in ("nuclear_norm", "trace_gradients", "sqrtm"):
            monkeypatch.setattr(f"fastgan.linalg._{op}.by_products", lambda operand: value)

    return choose


def weighted(matrix):
    return (matrix * torch.arange(matrix.shape[-1], device=matrix.device)).sum()


def leaf(matrix):
    return matrix.detach().clone().requires_grad_()


def both_orders(function, *operands):
    operands = [leaf(operand) for operand in operands]
    first = grad(function(*operands), operands, create_graph=True)
    return [*first, *grad(sum((g * g.detach().roll(1, -1)).sum() for g in first), operands)]


CASES = {
    "definite": lambda: (lambda a, b: trace_sqrt_product(a, b).sum(), covariance(33), covariance(2, 33)),
    "scaled": lambda: (trace_sqrt_product, 1e12 * covariance(5), 1e-12 * covariance(5)),
    "wide": lambda: (lambda m: nuclear_norm(m).sum(), torch.randn(2, 7, 12, dtype=torch.float64)),
    "tall": lambda: (nuclear_norm, torch.randn(12, 7, dtype=torch.float64)),
    "root": lambda: (lambda a: weighted(sqrtm(a)), covariance(11)),
    "inverse root": lambda: (
        lambda a: (sqrtm(a, inverse=True) * torch.arange(11.0, device=a.device)).sum(),
        covariance(11),
    ),
    "empty": lambda: (lambda a, b: trace_sqrt_product(a, b).sum(), covariance(0, 3), covariance(3)),
}


@pytest.mark.parametrize("name", CASES)
def test_they_equal_those_by_eigenvectors(name, by_products):
    function, *operands = CASES[name]()
    by_products(False)
    expected = both_orders(function, *operands)
    by_products(True)
    leaves = [leaf(operand) for operand in operands]
    value = function(*leaves)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        first = grad(value, leaves, create_graph=True)
        grad(sum((g * g).sum() for g in first), leaves)
    assert not EIGENSOLVERS & {event.key for event in profile.key_averages()}
    for got, want in zip(both_orders(function, *operands), expected, strict=True):
        largest = want.detach().abs().max().item() if want.numel() else 0
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * largest)
        assert got.stride() == want.stride()


def test_gradcheck(by_products):
    by_products(True)
    a, b, m = leaf(covariance(4)), leaf(covariance(2, 4)), leaf(torch.randn(3, 5, dtype=torch.float64))
    for function, operands in ((trace_sqrt_product, (a, b)), (nuclear_norm, (m,)), (sqrtm, (a,))):
        assert gradcheck(function, operands)
        assert gradgradcheck(function, operands)


def test_graded_spectra(by_products):
    a, b = (f @ f.mT for f in (factor("geometric", 31), factor("repeated", 31)))
    m = rotation(9) @ torch.diag(spectrum("geometric", 9)) @ rotation(9)
    for function, operands in ((trace_sqrt_product, (a, b)), (nuclear_norm, (m,))):
        found = {}
        for products in (False, True):
            by_products(products)
            leaves = [leaf(operand) for operand in operands]
            found[products] = grad(function(*leaves), leaves)
        for got, want in zip(found[True], found[False], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8 * want.abs().max().item())


def test_singular_matrices_fall_back_to_eigenvectors(by_products):
    low = torch.randn(6, 3, dtype=torch.float64)
    for function, operands in (
        (trace_sqrt_product, (low @ low.mT, covariance(6))),
        (trace_sqrt_product, (torch.zeros(4, 4).double(), covariance(4))),
        (nuclear_norm, (low @ torch.randn(3, 8).double(),)),
        (lambda a: sqrtm(a).trace(), (torch.diag(torch.tensor([1.0, 0.0, 0.0])).double(),)),
    ):
        by_products(False)
        expected = both_orders(function, *operands)
        by_products(True)
        for got, want in zip(both_orders(function, *operands), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_equals_cpu(name):
    function, *operands = CASES[name]()
    expected = both_orders(function, *operands)
    for got, want in zip(both_orders(function, *(o.cuda() for o in operands)), expected, strict=True):
        largest = want.detach().abs().max().item() if want.numel() else 0
        torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-9 * largest)
