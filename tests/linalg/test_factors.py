import math

import pytest
import torch

from fastgan.linalg import (
    covariance_factor,
    drop_redundant_row,
    trace_sqrt_product,
    trace_sqrt_product_from_factors,
)
from tests.linalg.spectra import count_factorizations, covariance, covariance_of_rank, relative_error


def test_a_factor_that_is_given_is_not_computed():
    candidates = torch.randn(4, 5, 33, dtype=torch.float64)
    reference = torch.linalg.cholesky(covariance(33)).mT  # (33, 33), F^T F the covariance
    assert count_factorizations(lambda: trace_sqrt_product_from_factors(reference, candidates)) == 0
    one = reference.mT @ reference
    assert count_factorizations(lambda: trace_sqrt_product_from_factors(candidates, cov=one)) == 1
    expected = trace_sqrt_product(one, candidates.mT @ candidates)
    for value in (
        trace_sqrt_product_from_factors(reference, candidates),
        trace_sqrt_product_from_factors(candidates, cov=one),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("definite", [True, False])
def test_one_factor_against_a_covariance(definite):
    x, _ = covariance_of_rank(6, 20, 0)
    y, b = covariance_of_rank(60 if definite else 7, 20, 1)
    batch = torch.stack([x, 2 * x, -x])
    value, info = trace_sqrt_product_from_factors(batch, cov=b, return_info=True)
    truth = torch.linalg.svdvals(x @ y.mT).sum() * torch.tensor([1.0, 2.0, 1.0]).double()
    assert relative_error(value, truth) < 1e-9
    assert value.shape == info.lower.shape == (3,)
    single = trace_sqrt_product_from_factors(batch.float(), cov=b.float())
    assert single.dtype == torch.float32


def test_triangular_roots_singular_ones_too():
    upper = torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, 1.0], [0.0, 0.0, -3.0]]).double()  # its rows add up to zero
    f = torch.randn(4, 2, 3, dtype=torch.float64)
    for root in (upper, torch.linalg.cholesky(covariance(3)).mT):
        truth = torch.linalg.svdvals(f @ root.mT).sum(-1)
        assert relative_error(trace_sqrt_product_from_factors(f, root), truth) < 1e-12
        b = covariance(2, 3)
        truth = torch.linalg.svdvals(root @ torch.linalg.cholesky(b)).sum(-1)
        value, info = trace_sqrt_product_from_factors(root, cov=b, return_info=True)
        assert relative_error(value, truth) < 1e-12
        assert (info.lower <= truth).all()
        assert (truth <= info.upper).all()
        assert relative_error(trace_sqrt_product_from_factors(1e-150 * root, cov=1e300 * b), truth) < 1e-12


def test_gradients_of_factors():
    x, y = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    b = covariance(6).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, y: trace_sqrt_product_from_factors(x, y), (x, y))
        assert check(lambda x, b: trace_sqrt_product_from_factors(x, cov=(b + b.mT) / 2), (x, b))


@pytest.mark.slow
def test_compiled_value_equals_eager():
    f, g = (torch.randn(n, 6, dtype=torch.float64) for n in (3, 4))
    compiled = torch.compile(trace_sqrt_product_from_factors, backend="aot_eager", fullgraph=True)
    expected = trace_sqrt_product_from_factors(f, g)
    torch.testing.assert_close(compiled(f, g), expected, rtol=1e-12, atol=0)
    cov = g.mT @ g + torch.eye(6)
    expected = trace_sqrt_product_from_factors(f, cov=cov)
    torch.testing.assert_close(compiled(f, cov=cov), expected, rtol=1e-12, atol=0)
    singular = g[:2].mT @ g[:2]
    expected = trace_sqrt_product_from_factors(f, cov=singular)
    torch.testing.assert_close(compiled(f, cov=singular), expected, rtol=1e-9, atol=0)


def test_bad_factors():
    eye, x = torch.eye(3), torch.ones(2, 3)
    for arguments, message in (
        ((x,), "one of g and cov must be given, got neither"),
        ((x, x, eye), "one of g and cov must be given, got both"),
        ((torch.ones(3), x), r"f must have shape \(\.\.\., n, d\)"),
        ((x, torch.ones(3)), r"g must have shape \(\.\.\., n, d\)"),
        ((x, torch.ones(2, 4)), r"g must have the d of f \(3\), got 4"),
        ((x, None, torch.eye(4)), r"cov must have the d of f \(3\), got 4"),
        ((x * math.nan, x), "f must be finite"),
        ((x, x * math.nan), "g must be finite"),
        ((x.double(), None, eye), "cov must have the dtype of f"),
        ((x, None, torch.diag(torch.tensor([1.0, 1.0, -1.0]))), "cov must be positive semi-definite"),
        ((x, None, torch.ones(3, 3).triu()), "cov must be symmetric"),
    ):
        f, g, cov = (*arguments, None, None)[:3]
        with pytest.raises(ValueError, match=f"^{message}"):
            trace_sqrt_product_from_factors(f, g, cov=cov)
    with pytest.raises(TypeError, match=r"f must be a torch\.Tensor, got NoneType"):
        trace_sqrt_product_from_factors(None, x)
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'extension', 'reference', got 'triton'"):
        trace_sqrt_product_from_factors(x, x, impl="triton")
    with pytest.raises(ValueError, match="method='jacobi' needs the extension and d <= 64, got .* d = 65"):
        trace_sqrt_product(torch.eye(65), torch.eye(65), method="jacobi")


def test_the_call_with_factors_names_the_new_function():
    for arguments in ({"factors": (torch.ones(2, 3), None)}, {"method": "lowrank"}):
        with pytest.raises(TypeError, match=r"use trace_sqrt_product_from_factors\(f, g\)"):
            trace_sqrt_product(None, torch.eye(3), **arguments)


@pytest.mark.parametrize("n", [4, 40])
def test_covariance_factor(n):
    _, cov = covariance_of_rank(n, 9, 0)
    root = covariance_factor(cov)
    assert root.shape == (min(n - 1, 9), 9)
    assert root.is_contiguous()
    torch.testing.assert_close(root.mT @ root, cov, rtol=0, atol=1e-14 * cov.max().item())
    assert covariance_factor(cov.float()).dtype == torch.float64
    zero = covariance_factor(torch.zeros(3, 3))
    assert torch.equal(zero, torch.zeros(1, 3, dtype=torch.float64))
    for bad, message in (
        (torch.ones(2, 3, 3), r"cov must have shape \(d, d\), got \(2, 3, 3\)"),
        (torch.ones(3, 3).triu(), "cov must be symmetric"),
        (-torch.eye(3), "cov must be positive semi-definite"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            covariance_factor(bad)


def test_drop_redundant_row():
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    assert drop_redundant_row(x) is x
    centered = x - x.mean(1, keepdim=True)
    rows = drop_redundant_row(centered)
    assert rows.shape == (2, 4, 7)
    torch.testing.assert_close(rows.mT @ rows, centered.mT @ centered)
