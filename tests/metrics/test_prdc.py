"""Precision, recall, density and coverage: against their definitions, loop by loop."""

import numpy as np
import pytest
import torch

from fastgan.metrics import InputError, precision_recall
from fastgan.metrics.prdc import distances
from tests.metrics.rows import UNUSABLE_PAIRS, rows


def brute_force(real, fake, k):
    def radii(x):
        return [sorted(np.linalg.norm(a - b) for b in x)[k] for a in x]

    real_radii, fake_radii = radii(real), radii(fake)
    inside = np.array([[np.linalg.norm(f - r) <= d for r, d in zip(real, real_radii, strict=True)] for f in fake])
    back = np.array([[np.linalg.norm(r - f) <= d for f, d in zip(fake, fake_radii, strict=True)] for r in real])
    return inside.any(1).mean(), back.any(1).mean(), inside.sum() / (k * len(fake)), inside.any(0).mean()


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_density_coverage_are_their_definitions(k, monkeypatch):
    monkeypatch.setattr("fastgan.metrics.prdc._BLOCK", 7)
    real, fake = rows(25, dim=3, dtype=torch.float32), rows(18, dim=3, shift=0.7, seed=1, dtype=torch.float32)
    result = precision_recall(real, fake, k=k)
    expected = brute_force(real.numpy(), fake.numpy(), k)
    assert (result.precision, result.recall, result.density, result.coverage) == pytest.approx(expected)
    assert 0 < result.recall < 1
    same = precision_recall(real, real, k=k)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)


@pytest.mark.parametrize(("real", "fake", "message"), UNUSABLE_PAIRS)
def test_wrong_features(real, fake, message):
    with pytest.raises(InputError, match=message):
        precision_recall(real, fake, k=1)


def test_wrong_arguments():
    x = rows(5)
    for call, message in (
        (lambda: precision_recall(x, x, k=0), "k must be at least 1"),
        (lambda: precision_recall(x, x, k=5), "at least 6 feature vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("copies", [0, 1, 40])
def test_distances_are_exact_for_near_rows_and_copies(copies):
    """float32 rows: from a product in float64, or from differences where that would cancel; equal ones stay equal."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(50, 40, generator=generator) + 100
    x = torch.cat([y[:5] * (1 + 1e-6), y[:1].repeat(copies, 1), torch.rand(5, 40, generator=generator) + 100])
    found = distances(x, y)
    expected = (x.double()[:, None] - y.double()).square().sum(-1).sqrt()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert (found[5 : 5 + copies, 0] == 0).all()
    assert torch.equal(found, distances(y, x).mT)
