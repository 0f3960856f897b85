import math

import pytest
import torch

from fastgan.linalg import trace_sqrt_product
from tests.linalg.spectra import count_factorisations, covariance, covariance_of_rank, relative_error


def test_a_factor_that_is_given_is_not_computed():
    candidates = torch.randn(4, 5, 33, dtype=torch.float64)
    reference = torch.linalg.cholesky(covariance(33)).mT  # (33, 33), F^T F the covariance
    assert count_factorisations(lambda: trace_sqrt_product(None, None, factors=(reference, candidates))) == 0
    one = reference.mT @ reference
    assert count_factorisations(lambda: trace_sqrt_product(one, None, factors=(None, candidates))) == 1
    expected = trace_sqrt_product(one, candidates.mT @ candidates)
    for value in (
        trace_sqrt_product(None, None, factors=(reference, candidates)),
        trace_sqrt_product(one, None, factors=(None, candidates)),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("definite", [True, False])
def test_one_factor_against_a_covariance(definite):
    x, _ = covariance_of_rank(6, 20, 0)
    y, b = covariance_of_rank(60 if definite else 7, 20, 1)
    batch = torch.stack([x, 2 * x, -x])
    value, info = trace_sqrt_product(None, b, factors=(batch, None), return_info=True)
    truth = torch.linalg.svdvals(x @ y.mT).sum() * torch.tensor([1.0, 2.0, 1.0]).double()
    assert relative_error(value, truth) < 1e-9
    assert value.shape == info.lower.shape == (3,)
    assert relative_error(trace_sqrt_product(b, None, factors=(None, batch)), truth) < 1e-9
    single = trace_sqrt_product(None, b.float(), factors=(batch.float(), None))
    assert single.dtype == torch.float32


def test_triangular_roots_singular_ones_too():
    upper = torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, 1.0], [0.0, 0.0, -3.0]]).double()  # its rows add up to zero
    f = torch.randn(4, 2, 3, dtype=torch.float64)
    for root in (upper, torch.linalg.cholesky(covariance(3)).mT):
        truth = torch.linalg.svdvals(f @ root.mT).sum(-1)
        assert relative_error(trace_sqrt_product(None, None, factors=(f, root)), truth) < 1e-12
        b = covariance(2, 3)
        truth = torch.linalg.svdvals(root @ torch.linalg.cholesky(b)).sum(-1)
        value, info = trace_sqrt_product(None, b, factors=(root, None), return_info=True)
        assert relative_error(value, truth) < 1e-12
        assert (info.lower <= truth).all()
        assert (truth <= info.upper).all()
        assert relative_error(trace_sqrt_product(None, 1e300 * b, factors=(1e-150 * root, None)), truth) < 1e-12


def test_gradients_of_factors():
    x, y = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    b = covariance(6).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, y: trace_sqrt_product(None, None, factors=(x, y)), (x, y))
        assert check(lambda x, b: trace_sqrt_product(None, (b + b.mT) / 2, factors=(x, None)), (x, b))


def test_bad_factors():
    eye, x = torch.eye(3), torch.ones(2, 3)
    for arguments, message in (
        ({"factors": (None, None)}, "factors must be a pair with at least one factor"),
        ({"method": "lowrank"}, "factors must be a pair with at least one factor"),
        ({"factors": (x, None), "method": "polar"}, "method must be 'auto' or 'lowrank' where factors are given"),
        ({"factors": (torch.ones(3), None)}, r"factors\[0\] must have shape \(\.\.\., n, d\)"),
        ({"factors": (None, torch.ones(2, 4))}, r"factors\[1\] must have the d of a \(3\), got 4"),
        ({"factors": (x * math.nan, None)}, r"factors\[0\] must be finite"),
        ({"factors": (x.double(), None)}, r"b must have the dtype of factors\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            trace_sqrt_product(eye, eye, **arguments)
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor, got NoneType"):
        trace_sqrt_product(None, None, factors=(x, None))
    with pytest.raises(ValueError, match="b must be positive semi-definite"):
        trace_sqrt_product(None, torch.diag(torch.tensor([1.0, 1.0, -1.0])), factors=(x, None))
    with pytest.raises(ValueError, match="method='jacobi' needs the extension and d <= 64, got .* d = 65"):
        trace_sqrt_product(torch.eye(65), torch.eye(65), method="jacobi")
