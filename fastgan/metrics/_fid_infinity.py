"""The bias of a Frechet distance of finitely many images: its curve over their number, and its limit with an error.

Chong & Forsyth, "Effectively Unbiased FID and Inception Score and where to find them", 2020: the bias of a finite
sample is linear in 1 / n. They fit a line through the distances of many subsets; here it goes through two points, all
vectors and the mean of two random halves. The mean of four quarters shows how far the bias is from a line: with
fewer than 4 vectors per feature it is not linear at all, and the extrapolation is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgan._checks import InputError, check_features, check_seed
from fastgan._files import atomic_path, check_output
from fastgan.linalg import sqrtm
from fastgan.metrics.frechet import cross_term, frechet_distances
from fastgan.metrics.moments import as_features
from fastgan.metrics.stats import FeatureStats

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure

GROUPS = 12
LEAST = 2 * GROUPS
LEAST_PER_FEATURE = 4
"""Vectors that an extrapolation needs: :func:`least_for_infinity`."""

SMALLEST = 128
"""Vectors of the first point of a bias curve."""


@dataclass(frozen=True)
class InfiniteFrechet:
    """``value`` in the squared units of the features, its standard error, and the distance at ``n`` itself.

    Attributes:
        value: the distance extrapolated to infinitely many vectors, unbiased to first order in 1 / n; 0 where the line
            ends below it.
        standard_error: the root of the sum of three squares: what another sample of ``n`` vectors would change, from
            the spread of the distance's influence function over groups of vectors; the difference that a parabola
            makes in place of the line; and what was below 0.
        distance: the plain distance of the ``n`` vectors.
    """

    value: float
    standard_error: float
    distance: float
    n: int


def fid_infinity(
    features: Tensor | npt.ArrayLike,
    reference: FeatureStats,
    *,
    backbone: str | None = None,
    protocol: str | None = None,
    seed: int = 0,
) -> InfiniteFrechet:
    """Extrapolate the Frechet distance of ``features`` (n, dim) to ``reference`` to infinite n.

    The bias that the reference's own finite number brings stays. The line in 1 / n holds where n is well above dim.

    Args:
        features: of the generated images, of any floating dtype.
        reference: statistics of the real ones.
        backbone, protocol: of ``features``, checked against the reference's.
        seed: of the division into halves.

    Raises:
        InputError: fewer than 24 vectors or than 4 per feature, or features and reference do not fit.

    Example:
        >>> reference = FeatureStats().update(torch.randn(200, 4))
        >>> result = fid_infinity(torch.randn(200, 4), reference)
        >>> result.value >= 0
        True
    """
    if not isinstance(reference, FeatureStats):
        raise InputError(f"reference must be FeatureStats, got {type(reference).__name__}")
    features = as_features("features", features)
    check_features(features=features, least=LEAST)
    n, dim = features.shape
    if n < (needed := least_for_infinity(dim)):
        raise InputError(
            f"features must have at least {needed} vectors for an extrapolation of {dim} features "
            f"({LEAST_PER_FEATURE} per feature), it has {n}"
        )

    def stats(parts: list[FeatureStats]) -> FeatureStats:
        merged = FeatureStats(features.shape[1], backbone=backbone, protocol=protocol)
        for part in parts:
            merged.merge(part)
        return merged

    groups = [stats([]).update(features[part]) for part in _random_order(features, seed).tensor_split(GROUPS)]
    quarters = [stats(groups[i : i + GROUPS // 4]) for i in range(0, GROUPS, GROUPS // 4)]
    halves = [stats(quarters[:2]), stats(quarters[2:])]
    whole = stats(halves)
    distances = frechet_distances(reference, [whole, *halves, *quarters])
    distance, of_halves, of_quarters = (part.mean().item() for part in distances.split([1, 2, 4]))

    # to first order the distance is the mean of an influence function, whose means over the groups tell its spread
    mean_pull = 2 * (whole.mean - reference.mean.to(whole.mean.device))
    cov_pull = _covariance_gradient(whole.cov, reference.cov.to(whole.mean.device))
    influences = []
    for group in groups:
        shift = group.mean - whole.mean
        assert group.n is not None
        second_moment = group.cov * ((group.n - 1) / group.n) + torch.outer(shift, shift)
        influences.append(mean_pull @ shift + (cov_pull * second_moment).sum())
    sampling = torch.stack(influences).std().item() / GROUPS**0.5
    line = 2 * distance - of_halves  # through (1 / n, distance) and (2 / n, mean of the halves), at 1 / n = 0
    parabola = (8 * distance - 6 * of_halves + of_quarters) / 3
    return InfiniteFrechet(max(line, 0.0), math.hypot(sampling, line - parabola, min(line, 0.0)), distance, n)


def least_for_infinity(dim: int) -> int:
    """The number of vectors of ``dim`` features that :func:`fid_infinity` needs."""
    return max(LEAST, LEAST_PER_FEATURE * dim)


def distance_influences(features: Tensor, stats: FeatureStats, reference: FeatureStats) -> Tensor:
    """The first-order influence of each vector of ``features`` (n, dim), whose statistics are ``stats``, on the Frechet
    distance to ``reference``, (n,) float64 of mean 0: their standard deviation over sqrt(n) is its standard error."""
    mean, cov = stats.mean, stats.cov
    rows = features.to(mean) - mean
    cov_pull = _covariance_gradient(cov, reference.cov.to(mean.device))
    pulled = rows @ cov_pull
    influences = 2 * (rows @ (mean - reference.mean.to(mean.device))) + (pulled * rows).sum(1)
    return influences - influences.mean()


def _random_order(features: Tensor, seed: int) -> Tensor:
    check_seed("seed", seed)
    return torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)


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
        (gradient,) = torch.autograd.grad(cross_term(cov, reference), cov)
    return gradient


@dataclass(frozen=True)
class BiasCurve:
    """``distances[i]`` is that of the first ``sizes[i]`` images in a random order."""

    sizes: list[int]
    distances: list[float]


def bias_curve(features: Tensor, reference: FeatureStats, *, seed: int = 0) -> BiasCurve:
    """Frechet distances to ``reference`` of growing random parts of ``features`` (n, dim): 128, 256, 512, ... and n.

    Raises:
        InputError: fewer than 2 vectors, or of another dim than the reference's.
    """
    check_features(features=features, least=2)
    n, order = len(features), _random_order(features, seed)
    sizes = [size for size in (SMALLEST << i for i in range(n.bit_length())) if size < n] + [n]
    running, parts, start = FeatureStats(features.shape[1]), [], 0
    for size in sizes:
        running.update(features[order[start:size]])
        parts.append(FeatureStats(features.shape[1]).merge(running))
        start = size
    return BiasCurve(sizes, frechet_distances(reference, parts).tolist())


def check_plot_path(path: Path) -> None:
    """Raise ``InputError`` unless :func:`plot_bias` can write to ``path``: its folder is there, its format known."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InputError(f"cannot write {path}: its name must end in one of {', '.join(f'.{kind}' for kind in known)}")
    check_output(path)


def plot_bias(
    curve: BiasCurve, path: Path, *, label: str, floor: float | None = None, limit: float | None = None
) -> None:
    """Draw the curve to an image file, in the format of its extension.

    Args:
        label: name of the distance.
        floor: the distance of two splits of the real data, a horizontal line.
        limit: the distance extrapolated to infinitely many images, another.

    Raises:
        InputError: the file cannot be written, or matplotlib knows no such format.
    """
    check_plot_path(path)
    figure = draw_bias(curve, label=label, floor=floor, limit=limit)
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def draw_bias(curve: BiasCurve, *, label: str, floor: float | None = None, limit: float | None = None) -> Figure:
    """The figure that :func:`plot_bias` writes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.sizes, curve.distances, "o-")
    for value, name in ((floor, "real against real"), (limit, "infinitely many images")):
        if value is not None:
            axes.axhline(value, linestyle="--", color="tab:gray")
            axes.annotate(name, (curve.sizes[0], value), va="bottom")
    axes.set(xscale="log", xlabel="images", ylabel=label, title="The same images, more and more of them")
    if min(curve.distances) > 0 and limit != 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    return figure
