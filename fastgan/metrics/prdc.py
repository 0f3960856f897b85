"""Precision, recall, density and coverage: how far two sets of features lie in each other's neighborhoods.

Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019; Naeem et al.,
"Reliable Fidelity and Diversity Metrics for Generative Models", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgan._checks import check_count, check_features
from fastgan.metrics.moments import as_features

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK = 2048
_CANCELLED = 1e-6  # squared distances below this share of the squared lengths are computed again
_MOST_NEAR = 0.01  # share of such distances from which on none comes from a product


@dataclass(frozen=True)
class Neighborhoods:
    """Shares in [0, 1], of which density alone may exceed 1; ``k`` is the neighbor that gives a ball its radius."""

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


def precision_recall(real: Tensor | npt.ArrayLike, fake: Tensor | npt.ArrayLike, *, k: int = 5) -> Neighborhoods:
    """Precision, recall, density and coverage of ``fake`` (m, dim) against ``real`` (n, dim).

    Around each vector lies a ball that reaches its ``k``-th nearest neighbor within its own set. Precision is the
    share of fake vectors in a real ball, recall that of real vectors in a fake one; density is the number of real balls
    that a fake vector lies in, divided by k; coverage the share of real balls with a fake vector in them. Distances are
    Euclidean, computed in blocks in the features' precision, at least float32: memory is linear in n and m.

    Raises:
        InputError: the features are not two finite sets of more than ``k`` vectors and one dim.
        ValueError: ``k`` under 1.

    Example:
        >>> features = torch.randn(20, 4)
        >>> result = precision_recall(features, features, k=3)
        >>> result.precision, result.recall
        (1.0, 1.0)
    """
    check_count("k", k, 1)
    real, fake = as_features("real", real), as_features("fake", fake)
    check_features(real=real, fake=fake, least=k + 1)
    of_each = memberships(real, fake, k=k)
    return Neighborhoods(**{name: each.mean().item() for name, each in of_each.items()}, k=k)


def memberships(real: Tensor, fake: Tensor, *, k: int) -> dict[str, Tensor]:
    """Return each vector's contribution to :func:`precision_recall`, whose values are their means: ``precision`` and
    ``density`` (m,) of the fake vectors, ``recall`` and ``coverage`` (n,) of the real ones, float64."""
    dtype = torch.promote_types(torch.promote_types(real.dtype, fake.dtype), torch.float32)  # float64 stays
    real, fake = real.to(dtype), fake.to(dtype)
    real_radius, fake_radius = radii(real, k), radii(fake, k)
    hits = []
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for block, radius in zip(fake.split(_BLOCK), fake_radius.split(_BLOCK), strict=True):
        distance = distances(block, real)
        in_real_ball = distance <= real_radius
        hits.append(in_real_ball.sum(dim=1))
        covered |= in_real_ball.any(dim=0)
        recalled |= (distance <= radius[:, None]).any(dim=0)
    balls = torch.cat(hits).double()
    return {
        "precision": (balls > 0).double(),
        "recall": recalled.double(),
        "density": balls / k,
        "coverage": covered.double(),
    }


def radii(rows: Tensor, k: int) -> Tensor:
    """Return the distance of each vector to its k-th nearest neighbor, itself not counted."""
    # the distance to itself is the smallest, so the (k + 1)-th smallest is the k-th neighbor's
    return torch.cat([distances(block, rows).kthvalue(k + 1, dim=1).values for block in rows.split(_BLOCK)])


def nearest(x: Tensor, y: Tensor, *, itself: bool = False) -> tuple[Tensor, Tensor]:
    """The distance of each row of ``x`` to its nearest row of ``y``, and that row's index; with ``itself``, ``x`` is
    ``y`` and a row is no neighbor of its own."""
    found_distances, indices = [], []
    for start in range(0, len(x), _BLOCK):
        block = distances(x[start : start + _BLOCK], y)
        if itself:
            rows = torch.arange(len(block), device=block.device)
            block[rows, rows + start] = float("inf")
        found = block.min(dim=1)
        found_distances.append(found.values)
        indices.append(found.indices)
    return torch.cat(found_distances), torch.cat(indices)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the Euclidean distances (n, m) of the rows of ``x`` to those of ``y``, exact for near ones.

    Of float32 rows on a CPU they come from a matrix product in float64, which is rounded to float32 in the end, so that
    equal distances stay equal. Where |x|^2 + |y|^2 - 2 x.y would cancel, they are computed again from the difference.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    if dtype == torch.float32 and x.device.type == "cpu":
        center = y.double().mean(dim=0)
        a, b = x.double() - center, y.double() - center
        scale = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
        squares = torch.addmm(scale, a, b.mT, alpha=-2)
        row, column = (squares < _CANCELLED * scale).nonzero(as_tuple=True)
        if len(row) <= _MOST_NEAR * squares.numel():
            for i, j in zip(row.split(_BLOCK), column.split(_BLOCK), strict=True):
                squares[i, j] = (x[i].double() - y[j].double()).square().sum(dim=1)
            return squares.sqrt().float()
    # without matrix products: |x|^2 + |y|^2 - 2 x.y loses the digits of near neighbors
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
