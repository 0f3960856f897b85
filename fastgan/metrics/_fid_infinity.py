"""The Frechet distance that infinitely many generated images would have, with its error.

Chong & Forsyth, "Effectively Unbiased FID and Inception Score and where to find them", 2020: the bias of a finite
sample is linear in 1 / n. They fit a line through the distances of many subsets; here it goes through two points, all
vectors and the mean of two random halves, so that three distances are enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.linalg import sqrtm, trace_sqrt_product
from fastgan.metrics.feature_checks import check_features
from fastgan.metrics.frechet_many import frechet_distances
from fastgan.metrics.stats import FeatureStats

GROUPS = 12
LEAST = 2 * GROUPS
"""Vectors that an extrapolation needs."""


@dataclass(frozen=True)
class InfiniteFrechet:
    """``value`` in the squared units of the features, its standard error, and the distance at ``n`` itself.

    Attributes:
        value: the distance extrapolated to infinitely many vectors; unbiased to first order in 1 / n, so it may fall
            below 0 by some standard errors.
        standard_error: what another sample of ``n`` vectors would change, from the spread of the distance's influence
            function over groups of vectors.
        distance: the plain distance of the ``n`` vectors.
    """

    value: float
    standard_error: float
    distance: float
    n: int


def fid_infinity(
    features: Tensor,
    reference: FeatureStats,
    *,
    backbone: str | None = None,
    resize: str | None = None,
    seed: int = 0,
) -> InfiniteFrechet:
    """Extrapolate the Frechet distance of ``features`` (n, dim) to ``reference`` to infinite n.

    The bias that the reference's own finite number brings stays. The line in 1 / n holds where n is well above dim.

    Args:
        features: of the generated images, of any floating dtype.
        reference: statistics of the real ones.
        backbone, resize: of ``features``, checked against the reference's.
        seed: of the division into halves.

    Raises:
        InputError: fewer than 24 vectors, or features and reference do not fit.
    """
    check_features("features", features, least=LEAST)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    groups = [
        FeatureStats(features.shape[1], backbone=backbone, resize=resize).update(features[part])
        for part in order.tensor_split(GROUPS)
    ]
    halves = [_merged(groups[: GROUPS // 2]), _merged(groups[GROUPS // 2 :])]
    whole = _merged(halves)
    distance, first, second = frechet_distances(reference, [whole, *halves]).tolist()
    half_mean, n = (first + second) / 2, len(features)
    # through (1 / n, distance) and (2 / n, half_mean), at 1 / n = 0
    return InfiniteFrechet(2 * distance - half_mean, _standard_error(groups, whole, reference), distance, n)


def _merged(parts: list[FeatureStats]) -> FeatureStats:
    merged = FeatureStats(parts[0].dim, backbone=parts[0].backbone, resize=parts[0].resize)
    for part in parts:
        merged.merge(part)
    return merged


def _standard_error(groups: list[FeatureStats], whole: FeatureStats, reference: FeatureStats) -> float:
    """To first order the distance is the mean of an influence function; its group means tell its spread."""
    mean_pull = 2 * (whole.mean - reference.mean.to(whole.mean.device))
    cov_pull = _covariance_gradient(whole.cov, reference.cov.to(whole.mean.device))
    influences = []
    for group in groups:
        shift = group.mean - whole.mean
        assert group.n is not None
        second_moment = group.cov * ((group.n - 1) / group.n) + torch.outer(shift, shift)
        influences.append(mean_pull @ shift + (cov_pull * second_moment).sum())
    return torch.stack(influences).std().item() / len(groups) ** 0.5


def _covariance_gradient(cov: Tensor, reference: Tensor) -> Tensor:
    """d / dS of tr(S) - 2 tr((S R)^{1/2}): I - T, with T the optimal transport map, T S T = R."""
    identity = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    lower, failed = torch.linalg.cholesky_ex(cov)
    if failed.item() != 0:
        return identity - 2 * _trace_gradient(cov, reference)
    # T = L^{-T} (L^T R L)^{1/2} L^{-1}: a quarter of the cost of the gradient of the trace
    half = torch.linalg.solve_triangular(lower.mT, sqrtm(lower.mT @ reference @ lower), upper=True)
    return identity - torch.linalg.solve_triangular(lower.mT, half.mT, upper=True)


def _trace_gradient(cov: Tensor, reference: Tensor) -> Tensor:
    cov = cov.requires_grad_()
    with torch.enable_grad():
        try:
            cross = trace_sqrt_product(cov, reference)
        except ValueError as error:
            raise InputError(f"a side is no covariance: {error}") from error
        (gradient,) = torch.autograd.grad(cross, cov)
    return gradient
