"""KID, IS, precision and recall, density and coverage: against torchmetrics and the definitions, loop by loop."""

import numpy as np
import pytest
import torch

from fastgan.metrics import InputError
from fastgan.metrics._inception_score import inception_score
from fastgan.metrics.kid import kernel_distance, squared_mmd
from fastgan.metrics.prdc import precision_recall


def rows(n, dim=6, shift=0.0, seed=0, dtype=torch.float64):
    return (torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift).to(dtype)


@pytest.mark.parametrize("options", [{}, {"degree": 2, "gamma": 0.3, "coef": 2.0}])
def test_squared_mmd_is_its_double_sum(options):
    x, y = rows(7, shift=0.4), rows(5, seed=1)
    degree, gamma, coef = options.get("degree", 3), options.get("gamma", 1 / 6), options.get("coef", 1.0)

    def mean_kernel(left, right, skip_same):
        pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if not (skip_same and i == j)]
        return sum((gamma * float(left[i] @ right[j]) + coef) ** degree for i, j in pairs) / len(pairs)

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)
    assert squared_mmd(x, y, **options).item() == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_equals_torchmetrics_where_the_subsets_are_everything():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = rows(60, shift=0.2), rows(60, seed=1)
    theirs = kid.poly_mmd(x, y)
    ours = kernel_distance(x, y, subsets=3, subset_size=60)
    assert ours.mean == pytest.approx(theirs.item(), rel=1e-10)
    assert ours.std < 1e-12
    assert (ours.subsets, ours.subset_size) == (3, 60)


def test_kernel_distance_is_unbiased_and_seeded():
    x, y = rows(500), rows(400, seed=1)
    ours = kernel_distance(x, y, subsets=50, subset_size=100, seed=3)
    assert ours == kernel_distance(x, y, subsets=50, subset_size=100, seed=3)
    assert ours != kernel_distance(x, y, subsets=50, subset_size=100, seed=4)
    assert abs(ours.mean) < 3 * ours.std  # one distribution: zero on average, not biased upwards
    assert kernel_distance(x, y + 1, subsets=50, subset_size=100).mean > 10 * ours.std
    assert kernel_distance(x, y, subset_size=1000, subsets=2).subset_size == 400


@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score_is_its_definition(splits):
    logits = rows(20, dim=5) * 3
    order = torch.randperm(20, generator=torch.Generator().manual_seed(7))
    scores = []
    for part in np.array_split(logits[order].numpy(), splits):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        marginal = p.mean(0)
        scores.append(np.exp(np.mean([(q * np.log(q / marginal)).sum() for q in p])))
    result = inception_score(logits, splits=splits, seed=7)
    assert result.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert result.std == pytest.approx(np.std(scores, ddof=1) if splits > 1 else 0.0, rel=1e-9)
    assert result.mean >= 1


def test_inception_score_bounds_and_torchmetrics():
    identical = torch.zeros(8, 4)
    assert inception_score(identical, splits=2).mean == 1.0
    assert inception_score(1e3 * torch.eye(4), splits=1).mean == pytest.approx(4.0)
    score = pytest.importorskip("torchmetrics.image.inception").InceptionScore(feature=torch.nn.Flatten(), splits=1)
    images = rows(30, dim=12, dtype=torch.float32).view(30, 3, 2, 2)
    score.update(images)
    ours = inception_score(images.flatten(1), splits=1)
    assert ours.mean == pytest.approx(score.compute()[0].item(), rel=1e-5)


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


BAD = [
    (rows(5), rows(5, dim=4), "features of one dim, got 6 and 4"),
    (rows(1), rows(5), "real must have at least 2 feature vectors, it has 1"),
    (rows(5), torch.full((5, 6), float("nan")), "fake must be finite"),
    (rows(5), torch.zeros(5, 6, dtype=torch.int64), "fake must be floating-point features"),
    (rows(5)[0], rows(5), "real must be floating-point features"),
]


@pytest.mark.parametrize(("real", "fake", "message"), BAD)
def test_wrong_features(real, fake, message):
    for metric in (kernel_distance, lambda a, b: precision_recall(a, b, k=1)):
        with pytest.raises(InputError, match=message):
            metric(real, fake)


def test_wrong_arguments():
    x = rows(5)
    for call, message in (
        (lambda: kernel_distance(x, x, subsets=0), "subsets must be at least 1"),
        (lambda: kernel_distance(x, x, subset_size=1), "subset_size must be at least 2"),
        (lambda: precision_recall(x, x, k=0), "k must be at least 1"),
        (lambda: precision_recall(x, x, k=5), "at least 6 feature vectors"),
        (lambda: inception_score(x, splits=0), "splits must be at least 1"),
        (lambda: inception_score(x, splits=6), "of 6 splits needs as many images, there are 5"),
        (lambda: inception_score(x / 0), "logits must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
