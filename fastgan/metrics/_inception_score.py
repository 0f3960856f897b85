"""The inception score: how sure a classifier is of each image, and how even it is over all of them.

Salimans et al., "Improved Techniques for Training GANs", 2016. It never sees a real image; compare values of one
classifier, N and number of splits only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgan._checks import InputError, check_count, check_features, check_seed
from fastgan.metrics.moments import as_features

if TYPE_CHECKING:
    import numpy.typing as npt

_ROUNDING = 1e-6


@dataclass(frozen=True)
class InceptionScoreResult:
    """Mean of the score over the splits, at least 1 and at most the number of classes, and its population standard
    deviation (divided by the number of splits, as torch-fidelity's and our KID's)."""

    mean: float
    std: float
    splits: int


def inception_score(logits: Tensor | npt.ArrayLike, *, splits: int = 10, seed: int = 0) -> InceptionScoreResult:
    """exp(mean KL(p(y|x) || p(y))) of class scores ``logits`` (n, classes), over ``splits`` random parts.

    Raises:
        InputError: the logits are not finite, or fewer than ``splits``.
        ValueError: ``splits`` under 1, or a ``seed`` out of its range.

    Example:
        >>> inception_score(torch.zeros(20, 10), splits=2).mean  # no image looks like any class
        1.0
    """
    check_count("splits", splits, 1)
    check_seed("seed", seed)
    logits = as_features("logits", logits)
    check_features(logits=logits, least=1)
    if len(logits) < splits:
        raise InputError(f"an inception score of {splits} splits needs as many images, there are {len(logits)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    parts = logits[order.to(logits.device)].double().log_softmax(dim=1).tensor_split(splits)
    scores = []
    for log_p in parts:
        log_marginal = log_p.logsumexp(dim=0) - torch.tensor(len(log_p), dtype=log_p.dtype).log()
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())
    score = torch.stack(scores)
    if score.min() < 1 - _ROUNDING:
        raise AssertionError(f"an inception score is at least 1, got {score.min().item()}")
    score = score.clamp(min=1.0)
    return InceptionScoreResult(score.mean().item(), score.std(unbiased=False).item(), splits)
