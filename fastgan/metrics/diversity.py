"""Metrics of memorisation and diversity on features: MiFID, AuthPct, the C_T score, Vendi, and CMMD's distance.

Each follows its authors' formula or published code on equal features; none needs images.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan._checks import InputError, check_features
from fastgan.linalg import nuclear_norm
from fastgan.metrics.frechet import frechet_distance
from fastgan.metrics.kid import gaussian, squared_mmd
from fastgan.metrics.moments import as_features
from fastgan.metrics.prdc import nearest
from fastgan.metrics.stats import FeatureStats

if TYPE_CHECKING:
    import numpy.typing as npt

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_BLOCK = 2048
_ROUNDING = 1e-12  # of a Frechet distance, relative to the variances


def cmmd(real: Tensor | npt.ArrayLike, fake: Tensor | npt.ArrayLike) -> float:
    """CMMD: 1000 times the squared MMD of unit vectors with a Gaussian kernel of sigma 10, its biased estimate.

    Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", 2024, on features of
    CLIP ViT-L/14 at 336 pixels; other features give a distance of this form and another size. Lower is better.

    Args:
        real, fake: features (n, dim) and (m, dim); they are normalized here.

    Raises:
        InputError: the features are not two finite sets of at least 2 vectors and one dim.

    >>> same = torch.eye(4)
    >>> abs(cmmd(same, same)) < 1e-9
    True
    """
    x, y = _checked(real, fake, least=2)
    x, y = directions(x), directions(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return gaussian(a, b, sigma=CMMD_SIGMA)

    return CMMD_SCALE * squared_mmd(x, y, kernel, unbiased=False).item()


def mifid(real: Tensor | npt.ArrayLike, fake: Tensor | npt.ArrayLike, *, cosine_distance_eps: float = 0.1) -> float:
    """The memorisation-informed Frechet distance: divided by how near the fake vectors are to real ones, where that is
    nearer than ``cosine_distance_eps``. Lower is better.

    Bai et al., "On Training Sample Memorization: Lessons from Benchmarking Generative Modeling with a Large-scale
    Competition", 2021, as their competition's code and torchmetrics compute it: the cosine distance of each fake vector
    to its nearest real one, averaged, and 1e-15 in the denominator.

    Args:
        real, fake: features (n, dim) and (m, dim), the real ones those that were trained on.
        cosine_distance_eps: in (0, 1].

    Raises:
        InputError: the features are not two finite sets of at least 2 vectors and one dim.
        ValueError: ``cosine_distance_eps`` is out of its range.

    Example:
        >>> value = mifid(torch.randn(50, 4), torch.randn(50, 4))
    """
    if not 0 < cosine_distance_eps <= 1:
        raise ValueError(f"cosine_distance_eps must be in (0, 1], got {cosine_distance_eps}")
    x, y = _checked(real, fake, least=2)
    stats = FeatureStats().update(y), FeatureStats().update(x)
    return informed_distance(*stats, memorization(x, y, cosine_distance_eps=cosine_distance_eps)[1])


def informed_distance(fake: FeatureStats, real: FeatureStats, penalty: float) -> float:
    """Return the Frechet distance over ``penalty``, of copies over 1e-15; one that is all rounding counts as 0."""
    distance = frechet_distance(fake, real)
    scale = sum(stats.moments()[1].trace().item() / max((stats.n or 2) - 1, 1) for stats in (fake, real))
    return 0.0 if distance <= _ROUNDING * scale else distance / (penalty + 1e-15)


def memorization(real: Tensor, fake: Tensor, *, cosine_distance_eps: float = 0.1) -> tuple[Tensor, float]:
    """Return the cosine distance of each fake vector to its nearest real one (m,), and :func:`mifid`'s divisor.

    The divisor is the mean of these if it is below ``cosine_distance_eps``, else 1. Vectors whose entries sum to 0 are
    left out, as in the competition's code.
    """
    sides = [rows.double()[rows.double().sum(1) != 0] for rows in (real, fake)]
    for name, rows in zip(("real", "fake"), sides, strict=True):
        if not len(rows):
            raise InputError(f"{name} must hold a vector whose entries do not sum to 0")
    real_directions, fake_directions = (directions(rows) for rows in sides)
    similarity = torch.cat([(part @ real_directions.mT).abs().amax(1) for part in fake_directions.split(_BLOCK)])
    mean = (1 - similarity).mean().item()
    return 1 - similarity, mean if mean < cosine_distance_eps else 1.0


def auth_pct(real: Tensor | npt.ArrayLike, fake: Tensor | npt.ArrayLike) -> float:
    """AuthPct: the percentage of fake vectors that are no near copies. Higher is better.

    A fake vector is authentic if it is further from its nearest real vector than that one is from its own nearest real
    neighbor. Alaa et al., "How Faithful is your Synthetic Data? Sample-level Metrics for Evaluating and Auditing
    Generative Models", 2022, as Stein et al., "Exposing flaws of generative model evaluation metrics", 2023, take it.

    Args:
        real, fake: features (n, dim) and (m, dim), the real ones those that were trained on.

    Raises:
        InputError: the features are not two finite sets of at least 2 vectors and one dim.

    Example:
        >>> auth_pct(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.1], [9.0]]))
        50.0
    """
    return 100 * authentic(*_checked(real, fake, least=2)).double().mean().item()


def authentic(real: Tensor, fake: Tensor) -> Tensor:
    """Return whether each fake vector (m,) is authentic in the sense of :func:`auth_pct`."""
    to_real, index = nearest(fake, real)
    among_real, _ = nearest(real, real, itself=True)
    return to_real > among_real[index]


def ct_score(
    train: Tensor | npt.ArrayLike,
    test: Tensor | npt.ArrayLike,
    fake: Tensor | npt.ArrayLike,
    *,
    cells: Tensor | None = None,
) -> float:
    """The C_T score of data copying: below 0 if fake vectors lie nearer to ``train`` than ``test`` does.

    Meehan, Chaudhuri & Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models", 2020: in each
    cell of the space the Mann-Whitney U of the distances to the nearest training vector, standardised, weighted with
    the share of test vectors in the cell. Their cells come from k-means.

    Args:
        train, test, fake: features (l, dim), (n, dim) and (m, dim).
        cells: int64 (l + n + m,), the cell of each vector of train, test and fake in this order; None for one cell.
            Cells without test or fake vectors are left out.

    Raises:
        InputError: the features are not finite sets of one dim, or no cell holds test and fake vectors.

    Example:
        >>> train, test, fake = torch.randn(40, 4), torch.randn(40, 4), torch.randn(40, 4)
        >>> score = ct_score(train, test, fake)  # clearly below 0 if the generated ones copy the training set
    """
    x, y = _checked(train, test, least=1)
    _, z = _checked(train, fake, least=1)
    sizes = [len(x), len(y), len(z)]
    if cells is None:
        cells = torch.zeros(sum(sizes), dtype=torch.int64)
    if cells.shape != (sum(sizes),):
        raise InputError(f"cells must have shape ({sum(sizes)},), got {tuple(cells.shape)}")
    of_train, of_test, of_fake = cells.split(sizes)
    total, weights = 0.0, 0.0
    for cell in of_test.unique().tolist():
        a, b, c = x[of_train == cell], y[of_test == cell], z[of_fake == cell]
        if not len(a) or not len(c):
            continue
        total += len(b) * ct_contributions(a, b, c).mean().item()
        weights += len(b)
    if not weights:
        raise InputError("no cell holds train, test and fake vectors")
    return total / weights


def vendi_score(features: Tensor | npt.ArrayLike, *, q: float = 1.0) -> float:
    """The Vendi score: the effective number of different vectors, from 1 to n; with cosine similarity.

    Friedman & Dieng, "The Vendi Score: A Diversity Evaluation Metric for Machine Learning", 2023: the exponential of
    the entropy of the eigenvalues of K / n. They are those of the smaller of the Gram matrices X X^T / n and X^T X / n
    of unit vectors, so that many vectors of few features cost little. For ``q`` of 1/2 the score is the squared nuclear
    norm of X / sqrt(n), which is exact where vectors repeat.

    Args:
        features: (n, dim); none may be zero.
        q: order of the entropy, Shannon's for 1; inf takes the largest eigenvalue alone.

    Raises:
        InputError: the features are not finite, or a vector is zero.
        ValueError: ``q`` is not positive.

    >>> round(vendi_score(torch.eye(3)), 6), round(vendi_score(torch.ones(5, 2)), 6)
    (3.0, 1.0)
    """
    if not q > 0:
        raise ValueError(f"q must be positive, got {q}")
    rows = as_features("features", features)
    check_features(features=rows, least=1)
    rows = rows.double()
    if not rows.any(dim=1).all():
        raise InputError("features must not hold a vector of zeros, which has no direction")
    rows = directions(rows)
    if q == 0.5:  # small eigenvalues, of which the Gram matrix loses the digits, count most
        return nuclear_norm(rows / len(rows) ** 0.5).square().item()
    gram = (rows @ rows.mT if rows.shape[0] <= rows.shape[1] else rows.mT @ rows) / len(rows)
    weights = torch.linalg.eigvalsh(gram).clamp(min=0)
    weights = weights[weights > 0] / weights.sum()
    if q == 1:
        score = (-(weights * weights.log()).sum()).exp()
    elif math.isinf(q):
        score = 1 / weights.max()
    else:
        score = weights.pow(q).sum().pow(1 / (1 - q))
    return score.item()


def directions(rows: Tensor) -> Tensor:
    """Return ``rows`` (n, dim) as float64 unit vectors, whatever their lengths; rows of zeros stay zeros."""
    rows = rows.double()
    largest = rows.abs().amax(dim=1, keepdim=True)  # whose square may be too large or too small for a float
    return F.normalize(rows / torch.where(largest > 0, largest, 1.0), dim=1)


def ct_contributions(train: Tensor, test: Tensor, fake: Tensor) -> Tensor:
    """Return what each vector of ``fake`` (m, dim) contributes to :func:`ct_score` of one cell, which is their mean."""
    m, n = len(fake), len(test)
    distance, of_test = nearest(fake, train)[0], nearest(test, train)[0].sort().values
    below = torch.searchsorted(of_test, distance, right=False).double()
    equal = torch.searchsorted(of_test, distance, right=True).double() - below
    above = below + equal / 2  # ties count half
    return m * (above - n / 2) / math.sqrt(m * n * (m + n + 1) / 12)


def _checked(real: Tensor | npt.ArrayLike, fake: Tensor | npt.ArrayLike, *, least: int) -> tuple[Tensor, Tensor]:
    x, y = as_features("real", real), as_features("fake", fake)
    check_features(real=x, fake=y, least=least)
    return x.double(), y.double()
