"""The Frechet distance of two sets of features, each taken as a Gaussian."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastgan._checks import InputError
from fastgan.linalg import trace_sqrt_product, trace_sqrt_product_from_factors
from fastgan.metrics.stats import FeatureStats, check_comparable

if TYPE_CHECKING:
    import numpy.typing as npt

METHODS = ("auto", "low_rank", "full")


def frechet_distance(
    a: FeatureStats | tuple[Tensor | npt.ArrayLike, Tensor | npt.ArrayLike],
    b: FeatureStats | tuple[Tensor | npt.ArrayLike, Tensor | npt.ArrayLike],
    *,
    method: str = "auto",
) -> float:
    """|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^{1/2}), in float64 and the squared units of the features.

    Called FID where the features are Inception's (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule
    Converge to a Local Nash Equilibrium", 2017). The distance of finite samples is biased upwards: compare values of
    equal n only.

    Args:
        a, b: statistics, or a pair (mean (dim,), unbiased covariance (dim, dim)).
        method: ``"low_rank"`` works on the centred features X where a side still holds them (n <= dim):
            ``||X_a X_b^T||_* / sqrt((n_a - 1)(n_b - 1))`` for the cross term, and likewise with a Cholesky factor for a
            side that does not. ``"full"`` always takes the covariances. ``"auto"`` is low_rank where it can be, and
            where it cannot factors no side whose :attr:`FeatureStats.known_root` is there.

    Returns:
        The distance, at least 0: a negative rounding error of two equal sets becomes 0.

    Raises:
        ValueError: the sides differ in dim, backbone or resizing, one has fewer than two vectors or is no covariance,
            or ``method`` is unknown or ``"low_rank"`` where neither side holds its features.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    stats_a, stats_b = _as_stats("a", a), _as_stats("b", b)
    check_comparable(stats_a, stats_b)
    mean_a, mean_b = stats_a.mean, stats_b.mean.to(stats_a.mean.device)
    factors = (None, None) if method == "full" else known_factors(stats_a, stats_b)
    if method == "low_rank" and stats_a.factor is None and stats_b.factor is None:
        raise ValueError("method='low_rank' needs a side with at most dim vectors, which then still holds its features")
    trace, cross = _traces(stats_a, factors[0], stats_b, factors[1])
    distance = (mean_a - mean_b).square().sum() + trace - 2 * cross
    return max(distance.item(), 0.0)


def _as_stats(name: str, value: Any) -> FeatureStats:
    if isinstance(value, FeatureStats):
        stats = value
    elif isinstance(value, tuple) and len(value) == 2:
        stats = FeatureStats.from_moments(*value)
    else:
        raise TypeError(f"{name} must be FeatureStats or a pair (mean, cov), got {type(value).__name__}")
    if stats.n is not None and stats.n < 2:
        raise InputError(f"{name} must have at least 2 feature vectors for a covariance, it has {stats.n}")
    return stats


def known_factors(a: FeatureStats, b: FeatureStats) -> tuple[Tensor | None, Tensor | None]:
    """For each side F with F^T F = cov, or None where the covariance serves better or alone is known.

    That is so of the second of two roots of full size: F cov F^T is one triangular product, and F G^T a full one.
    """
    known_a, known_b = a.known_root, b.known_root
    if known_a is not None and known_b is not None and a.factor is None and b.factor is None:
        return known_a, None
    return known_a, known_b


def _traces(
    stats_a: FeatureStats, factor_a: Tensor | None, stats_b: FeatureStats, factor_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """tr(S_a) + tr(S_b) and tr((S_a S_b)^{1/2}), without the covariance of a side that has a factor."""
    device = stats_a.mean.device
    sides = ((stats_a, factor_a), (stats_b, factor_b))
    covs = [stats.cov.to(device) for stats, factor in sides if factor is None]
    factors = [factor.to(device) for _, factor in sides if factor is not None]
    try:
        if factors:
            cross = trace_sqrt_product_from_factors(*factors, cov=covs[0] if covs else None)
        else:
            cross = trace_sqrt_product(*covs)
    except ValueError as error:  # finite and symmetric they are: so one has a clearly negative eigenvalue
        raise InputError(f"a side is no covariance: {error}") from error
    traces = [cov.trace() for cov in covs] + [factor.square().sum() for factor in factors]
    return traces[0] + traces[1], cross
