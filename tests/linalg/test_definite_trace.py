"""The extension's own method for definite matrices on a CPU, which takes a whole call of ``trace_sqrt_product``."""

import math

import pytest
import torch

from fastgan import backend
from fastgan.linalg import trace_sqrt_product
from fastgan.linalg._trace import DEFINITE_SIZE, definite
from tests.linalg.spectra import TOLERANCE, covariance, covariance_of_rank, nuclear_norm, rotation

pytestmark = pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")


def from_factors(a, b):
    return nuclear_norm(torch.linalg.cholesky(a), torch.linalg.cholesky(b))


def by_torch(a, b):
    lower = torch.linalg.cholesky(a)
    return torch.linalg.eigvalsh(lower.mT @ b @ lower).sqrt().sum(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 9, 16, 31, 33, 64, 65, 100, 255, DEFINITE_SIZE])
def test_as_accurate_as_torchs_eigenvalues(d, dtype):
    a, b = covariance(3, d, dtype=dtype), covariance(3, d, dtype=dtype)
    value, report = definite(a, b)
    wide = a.double(), b.double()
    truth = from_factors(*wide)
    error, error_of_torch = (((x.double() - truth) / truth).abs().max() for x in (value, by_torch(*wide)))
    assert value.dtype == dtype
    assert error < 2 * error_of_torch + 4 * torch.finfo(dtype).eps
    slack = 1e-15 * truth
    assert (report[:, 0] - slack <= truth).all()
    assert (truth <= report[:, 1] + slack).all()
    assert (report[:, 1] - report[:, 0] < 1e-12 * truth).all()


@pytest.mark.parametrize(
    "spectrum",
    [
        torch.ones(40),
        torch.arange(1.0, 41),
        torch.arange(1, 41).flip(0),
        torch.cat([torch.ones(20), torch.full((20,), 3.0)]),
        torch.logspace(0, -6, 40),
        torch.logspace(-6, 0, 40),
    ],
    ids=["identity", "rising", "falling", "two values", "graded down", "graded up"],
)
def test_spectra_that_are_known(spectrum):
    spectrum, axes = spectrum.double(), rotation(40)
    diagonal, turned = torch.diag(spectrum), axes @ torch.diag(spectrum) @ axes.mT
    for a in (diagonal, 0.5 * (turned + turned.mT)):
        value, report = definite(a, a)  # (A A)^{1/2} = A
        assert abs(value - spectrum.sum()) <= 0.5 * (report[1] - report[0]) + 1e-14 * spectrum.sum()
    value, _ = definite(diagonal, diagonal.flip(0, 1))
    torch.testing.assert_close(value, (spectrum * spectrum.flip(0)).sqrt().sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("one", "other"), [(1e150, 1e150), (1e-150, 1e-150), (1e150, 1e-150), (2.0**-1000, 1.0)])
def test_scales_do_not_matter(one, other):
    a, b = covariance(2, 20), covariance(2, 20)
    value, _ = definite(a * one, b * other)
    torch.testing.assert_close(value / math.sqrt(one) / math.sqrt(other), definite(a, b)[0], rtol=1e-13, atol=0)


def test_one_against_many_in_either_place_and_any_shape():
    one, many = covariance(12), covariance(2, 3, 12)
    value, report = definite(one, many)
    assert value.shape == (2, 3)
    assert report.shape == (2, 3, 4)
    each = torch.stack([definite(one, x)[0] for x in many.reshape(-1, 12, 12)]).reshape(2, 3)
    assert torch.equal(value, each)
    assert torch.equal(definite(many, one)[0], value)
    assert torch.equal(definite(one[None, None], many.mT)[0], value)
    assert definite(many[:, :1], many[:1]) is None  # each with each: the other methods factor each once


def test_what_it_leaves_to_the_other_methods():
    a = covariance(10)
    _, singular = covariance_of_rank(5, 10, seed=0)
    indefinite = a - 2 * torch.linalg.eigvalsh(a)[-1] * torch.eye(10, dtype=a.dtype)
    asymmetric, not_finite, infinite = a.clone(), a.clone(), a.clone()
    asymmetric[0, 1] += 1
    not_finite[3, 2] = math.nan
    infinite[3, 2] = infinite[2, 3] = math.inf
    for bad in (singular, indefinite, asymmetric, not_finite, infinite, torch.zeros_like(a)):
        assert definite(bad, a) is None
        assert definite(a, bad) is None
        assert definite(torch.stack([a, bad]), torch.stack([a, a])) is None
    torch.testing.assert_close(trace_sqrt_product(singular, a), trace_sqrt_product(singular, a, method="svd"))
    for bad, message in ((indefinite, "semi-definite"), (asymmetric, "symmetric"), (not_finite, "finite")):
        with pytest.raises(ValueError, match=rf"b must be.* {message}"):
            trace_sqrt_product(a, bad)


def test_results_do_not_depend_on_the_number_of_threads():
    a, b, before, results = covariance(7, 33), covariance(7, 33), torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(definite(a, b))
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(other, results[0], strict=True))
