"""The extrapolated distance with its error, and the curve of the bias over the number of images."""

import pytest
import torch

from fastgan.linalg import trace_sqrt_product
from fastgan.metrics import FeatureStats, InputError, fid_infinity, frechet_distance
from fastgan.metrics._fid_infinity import _covariance_gradient, _trace_gradient, bias_curve
from tests.metrics.rows import rows, stats


def test_infinity_is_unbiased_and_its_error_is_right():
    """Over 30 samples of a known distance the mean is right where the plain one is far off; errors are of size 1."""
    dim, n = 16, 400
    reference = FeatureStats.from_moments(torch.zeros(dim), torch.eye(dim))
    exact = 16 * 0.3**2 + 16 * (1.2 - 1) ** 2
    found = [fid_infinity(1.2 * rows(n, dim, seed) + 0.3, reference, seed=seed) for seed in range(30)]
    values = torch.tensor([result.value for result in found], dtype=torch.float64)
    plain_bias = torch.tensor([result.distance for result in found], dtype=torch.float64).mean() - exact
    assert abs(values.mean() - exact) < 0.25 * plain_bias
    errors = (values - exact) / torch.tensor([result.standard_error for result in found], dtype=torch.float64)
    assert 0.6 < errors.square().mean().sqrt() < 1.6
    assert found[0].distance == pytest.approx(
        frechet_distance(reference, FeatureStats().update(1.2 * rows(n, dim) + 0.3))
    )


def test_the_gradient_behind_the_error_is_the_distances():
    a, b = stats(40), stats(30, seed=1)
    cov = a.cov.requires_grad_()
    (expected,) = torch.autograd.grad(cov.trace() - 2 * trace_sqrt_product(cov, b.cov), cov)
    torch.testing.assert_close(_covariance_gradient(a.cov, b.cov), expected, rtol=1e-9, atol=1e-12)
    singular = stats(5).cov
    torch.testing.assert_close(
        _covariance_gradient(singular, b.cov), torch.eye(8, dtype=torch.float64) - 2 * _trace_gradient(singular, b.cov)
    )


def test_infinity_is_seeded_and_needs_enough():
    reference, x = stats(100), rows(100, seed=3)
    assert fid_infinity(x, reference, seed=1) == fid_infinity(x, reference, seed=1)
    assert fid_infinity(x, reference, seed=1).value != fid_infinity(x, reference, seed=2).value
    with pytest.raises(InputError, match="at least 24 feature vectors, it has 23"):
        fid_infinity(x[:23], reference)
    with pytest.raises(InputError, match="differ in backbone"):
        fid_infinity(x, FeatureStats(backbone="inception").update(x), backbone="other")


def test_the_bias_falls_with_the_number_of_images():
    rows = torch.randn(3000, 10, generator=torch.Generator().manual_seed(0))
    curve = bias_curve(rows, FeatureStats.from_moments(torch.zeros(10), torch.eye(10)))
    assert curve.sizes == [128, 256, 512, 1024, 2048, 3000]
    assert curve.distances == sorted(curve.distances, reverse=True)
    whole = frechet_distance(FeatureStats().update(rows), (torch.zeros(10), torch.eye(10)))
    assert curve.distances[-1] == pytest.approx(whole, rel=1e-9)


def test_a_reference_of_features_is_refused():
    with pytest.raises(InputError, match="reference must be FeatureStats, got Tensor"):
        fid_infinity(torch.randn(30, 2), torch.randn(30, 2))
