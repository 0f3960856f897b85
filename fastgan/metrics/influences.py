"""Influences of single generated images on a metric, from which its confidence intervals come.

A metric of m images is, to first order, a mean of one number per image; the standard deviation of these numbers over
sqrt(m) is its standard error. Where a metric is a mean, or is smooth in the distribution of the features, they are its
derivatives. Recall and coverage are neither: there they are the jackknife's, what leaving out the image changes, times
m - 1, whose variance is never too small in expectation (Efron & Stein, "The Jackknife Estimate of Variance", 1981).
The real images are held fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.metrics.diversity import directions
from fastgan.metrics.kid import Kernel, draw_at_most
from fastgan.metrics.moments import as_features
from fastgan.metrics.prdc import distances, radii

_BLOCK = 1024
_KERNEL_BLOCK = 4096


def mmd_influences(real: Tensor, fake: Tensor, kernel: Kernel, *, seed: int = 0) -> Tensor:
    """Return the influence of each row of ``fake`` (m, dim) on the squared MMD to ``real``: (m,) float64 of mean 0.

    The expectations in it are taken over at most 4000 rows of each side.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = (draw_at_most(rows, generator) for rows in (real, fake))
    blocks = [2 * (kernel(part, y).mean(1) - kernel(part, x).mean(1)) for part in fake.double().split(_KERNEL_BLOCK)]
    return centered(torch.cat(blocks))


def score_influences(logits: Tensor) -> Tensor:
    """Return the influence of each image's class scores (m, classes) on the inception score: (m,) float64 of mean 0."""
    log_p = logits.double().log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - torch.tensor(len(log_p), dtype=torch.float64).log()
    divergence = (log_p.exp() * (log_p - log_marginal)).sum(dim=1)
    return centered(divergence) * divergence.mean().exp()  # a change of the marginal has no first-order effect


def vendi_influences(features: Tensor) -> Tensor | None:
    """Return the influence of each row of ``features`` (m, dim) on the Vendi score: (m,) float64 of mean 0.

    None for m <= dim: the score then counts images rather than modes, and is not smooth in their distribution.
    """
    if features.shape[0] <= features.shape[1]:
        return None
    rows = directions(as_features("features", features))
    weights, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    seen = weights > weights.max() * 1e-12
    logs = torch.where(seen, weights.clamp(min=1e-300).log(), 0.0)
    surprise = -((rows @ vectors).square() * logs).sum(dim=1)
    return centered(surprise) * surprise.mean().exp()


def recall_influences(real: Tensor, fake: Tensor, *, k: int) -> Tensor | None:
    """Return the jackknife's influence of each row of ``fake`` (m, dim) on recall: (m,) float64 of mean 0.

    Leaving out a row takes its ball away, and widens the ball of each row that it is among the ``k`` nearest of to the
    ``k + 1``-th. None for fewer than ``k + 2`` rows.
    """
    m, n = len(fake), len(real)
    if m < k + 2:
        return None
    nearest = [distances(part, fake).topk(k + 2, dim=1, largest=False) for part in fake.split(_BLOCK)]
    radius = torch.cat([found.values[:, k] for found in nearest])
    wider = torch.cat([found.values[:, k + 1] for found in nearest])
    # the nearest of all is the row itself, or a copy of it: then leaving out the row changes nothing for the copy
    neighbors = torch.cat([found.indices[:, : k + 1] for found in nearest])
    change = torch.zeros(m, dtype=torch.float64, device=fake.device)
    for part in real.split(_BLOCK):
        between = distances(fake, part)  # (m, part)
        inside = between <= radius[:, None]
        count = inside.sum(dim=0)
        sole = torch.where(count == 1, inside.int().argmax(dim=0), -1)
        open_to_change = (count <= 1)[None] & (between <= wider[:, None]) & ~(inside & (count == 1)[None])
        ball, point = open_to_change.nonzero(as_tuple=True)
        removed = neighbors[ball]  # (pairs, k + 1): leaving out any of these, but the ball's own row, widens the ball
        kept = removed != ball[:, None]
        codes = (removed * len(part) + point[:, None])[kept].unique()
        row, point = codes // len(part), codes % len(part)
        gained = count[point] == 0
        change += torch.bincount(row[gained], minlength=m)
        rescued = torch.zeros(len(part), dtype=torch.bool, device=fake.device)
        rescued[point[(~gained) & (row == sole[point])]] = True
        change -= torch.bincount(sole[(count == 1) & ~rescued], minlength=m)
    return centered(-(m - 1) * change / n)


def coverage_influences(real: Tensor, fake: Tensor, *, k: int) -> Tensor:
    """Return the jackknife's influence of each row of ``fake`` (m, dim) on coverage: (m,) float64 of mean 0."""
    m, n = len(fake), len(real)
    alone = torch.zeros(m, dtype=torch.float64, device=fake.device)
    for part, radius in zip(real.split(_BLOCK), radii(real, k).split(_BLOCK), strict=True):
        inside = distances(fake, part) <= radius
        only = inside.sum(dim=0) == 1
        alone += torch.bincount(inside.int().argmax(dim=0)[only], minlength=m)
    return centered((m - 1) * alone / n)


def centered(values: Tensor) -> Tensor:
    """Return ``values`` as float64 less their mean."""
    values = values.double()
    return values - values.mean()
