"""Mean and scatter of features as one tensor, the form in which torchmetrics gathers a state from all processes.

The tensor is float64, (dim + 1, dim + 1): the number of vectors in the corner, the mean in the rest of the first row,
and the sum of centred outer products below it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.metrics.moments import joined
from fastgan.metrics.stats import FeatureStats


def empty_moments(dim: int) -> Tensor:
    """Of no vectors."""
    return torch.zeros(dim + 1, dim + 1, dtype=torch.float64)


def moments_of(features: Tensor) -> Tensor:
    """Of features (n, dim). Raises ``InputError`` where they are not finite."""
    n, mean, scatter = FeatureStats(features.shape[1]).update(features).moments(features.shape[1], features.device)
    return _pack(n, mean, scatter)


def merge_moments(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """Of all vectors of ``parts`` together."""
    merged, *others = parts
    for other in others:
        merged = _pack(merged[0, 0] + other[0, 0], *joined(*_unpack(merged), *_unpack(other)))
    return merged


def to_stats(moments: Tensor, side: str) -> FeatureStats:
    """As :class:`FeatureStats`. Raises ``InputError`` that names ``side`` where there are fewer than 2 vectors."""
    count, mean, scatter = _unpack(moments)
    n = int(count.item())
    if n < 2:
        raise InputError(f"at least 2 {side} images are needed for a Frechet distance, there are {n}")
    return FeatureStats.from_moments(mean, scatter / (n - 1), n=n)


def _pack(n: int | Tensor, mean: Tensor, scatter: Tensor) -> Tensor:
    packed = scatter.new_zeros(len(mean) + 1, len(mean) + 1)
    packed[0, 0], packed[0, 1:], packed[1:, 1:] = n, mean, scatter
    return packed


def _unpack(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return moments[0, 0], moments[0, 1:], moments[1:, 1:]
