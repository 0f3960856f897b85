"""Influences of single images are derivatives of the metric, or what leaving the image out changes."""

import numpy as np
import pytest
import torch

from fastgan.metrics import FeatureStats, frechet_distance, precision_recall
from fastgan.metrics._fid_infinity import distance_influences
from fastgan.metrics.influences import (
    coverage_influences,
    recall_influences,
    score_influences,
    vendi_influences,
)

DIM = 6


def rows(n, shift=0.0, seed=0):
    return np.random.default_rng(seed).standard_normal((n, DIM)) + shift


def test_influences_are_the_derivative_of_the_distance():
    """Adding a vector once more moves the distance by its influence over n, to first order."""
    features = torch.from_numpy(rows(200, 0.5, 4))
    reference, stats = FeatureStats().update(rows(300)), FeatureStats().update(features)
    influences = distance_influences(features, stats, reference)
    weight = 1e-4
    for i in (0, 17):
        mean = (1 - weight) * stats.mean + weight * features[i]
        shift = features[i] - stats.mean
        population = stats.cov * (199 / 200)
        moved = (1 - weight) * population + weight * (1 - weight) * torch.outer(shift, shift)
        before = frechet_distance((stats.mean, population), reference)
        change = (frechet_distance((mean, moved), reference) - before) / weight
        assert change == pytest.approx(influences[i].item(), rel=0.03, abs=0.02)


@pytest.mark.parametrize("name", ["recall", "coverage"])
@pytest.mark.parametrize(
    ("n", "m", "k", "shift"), [(60, 50, 3, 0.0), (80, 40, 1, 1.0), (30, 70, 5, 2.0), (20, 9, 7, 0.5)]
)
def test_jackknife_of_neighborhoods(name, n, m, k, shift):
    """Equal to computing the metric again without each row."""
    real, fake = torch.from_numpy(rows(n, seed=1)), torch.from_numpy(rows(m, shift, seed=2))
    whole = getattr(precision_recall(real, fake, k=k), name)
    without = [getattr(precision_recall(real, torch.cat([fake[:i], fake[i + 1 :]]), k=k), name) for i in range(m)]
    expected = (m - 1) * (whole - torch.tensor(without, dtype=torch.float64))
    found = {"recall": recall_influences, "coverage": coverage_influences}[name](real, fake, k=k)
    torch.testing.assert_close(found, expected - expected.mean(), rtol=0, atol=1e-9)


def test_jackknife_of_copies_and_of_too_few():
    real, fake = torch.from_numpy(rows(30, seed=1)), torch.from_numpy(rows(12, seed=2)).repeat(2, 1)
    for name, influences in (("recall", recall_influences), ("coverage", coverage_influences)):
        whole = getattr(precision_recall(real, fake, k=2), name)
        without = [getattr(precision_recall(real, torch.cat([fake[:i], fake[i + 1 :]]), k=2), name) for i in range(24)]
        expected = 23 * (whole - torch.tensor(without, dtype=torch.float64))
        torch.testing.assert_close(influences(real, fake, k=2), expected - expected.mean(), rtol=0, atol=1e-9)
    assert recall_influences(real, fake[:3], k=2) is None


def weighted_score(logits, weights):
    p = logits.softmax(1)
    return (weights[:, None] * p * (p.log() - (weights @ p).log())).sum().exp()


def weighted_vendi(features, weights):
    unit = torch.nn.functional.normalize(features, dim=1)
    eigenvalues = torch.linalg.eigvalsh(unit.mT @ (weights[:, None] * unit))
    return (-(eigenvalues * eigenvalues.log()).sum()).exp()


@pytest.mark.parametrize(
    ("metric", "influences"), [(weighted_score, score_influences), (weighted_vendi, vendi_influences)]
)
def test_influences_are_derivatives_by_the_weights(metric, influences):
    features = torch.from_numpy(rows(40, 0.5, 3))
    weights = torch.full((40,), 1 / 40, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(metric(features, weights), weights)
    torch.testing.assert_close(influences(features), gradient - gradient.mean(), rtol=1e-9, atol=1e-9)


def test_the_vendi_score_of_few_vectors_has_no_influences():
    assert vendi_influences(torch.from_numpy(rows(DIM))) is None
