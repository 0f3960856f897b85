"""The Frechet distance of two sets of features, each taken as a Gaussian: one, many in one call, and as a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgan._checks import InputError
from fastgan.linalg import (
    drop_redundant_row,
    nuclear_norm,
    trace_sqrt_product,
    trace_sqrt_product_from_factors,
)
from fastgan.metrics.stats import FeatureStats, check_comparable

if TYPE_CHECKING:
    import numpy.typing as npt

METHODS = ("auto", "low_rank", "full")

_MATRIX_BYTES = 1 << 30
"""Size of the covariances or products of features that are in memory at a time."""


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
        method: ``"low_rank"`` works on the centered features X where a side still holds them (n <= dim):
            ``||X_a X_b^T||_* / sqrt((n_a - 1)(n_b - 1))`` for the cross term, and likewise with a Cholesky factor for a
            side that does not. ``"full"`` always takes the covariances. ``"auto"`` is low_rank where it can be, and
            where it cannot factors no side whose :attr:`FeatureStats.known_root` is there.

    Returns:
        The distance, at least 0: a negative rounding error of two equal sets becomes 0.

    Raises:
        ValueError: the sides differ in dim, backbone or protocol, one has fewer than two vectors or is no covariance,
            or ``method`` is unknown or ``"low_rank"`` where neither side holds its features.

    Example:
        >>> zeros = FeatureStats().update(torch.zeros(10, 3))
        >>> ones = FeatureStats().update(torch.ones(10, 3))
        >>> frechet_distance(zeros, ones)  # three features, each off by one
        3.0
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    sides = [_as_stats("a", a), _as_stats("b", b)]
    check_comparable(*sides)
    low_rank = any(stats.holds_vectors for stats in sides)
    if method == "low_rank" and not low_rank:
        raise ValueError("method='low_rank' needs a side with at most dim vectors, which then still holds its features")
    mean, device = sides[0].mean, sides[0].device
    roots = [None if method == "full" else stats.known_root for stats in sides]
    if not low_rank and roots[0] is not None:
        roots[1] = None  # F cov F^T is one triangular product, where F G^T of two roots of full size is a full one
    roots = [None if root is None else root.to(device) for root in roots]
    covs = [stats.cov.to(device) if root is None else None for stats, root in zip(sides, roots, strict=True)]
    cross = cross_term(*covs, *roots)
    traces = [
        cov.trace() if cov is not None else root.square().sum()  # type: ignore[union-attr]
        for cov, root in zip(covs, roots, strict=True)
    ]
    distance = (mean - sides[1].mean.to(device)).square().sum() + (traces[0] + traces[1]) - 2 * cross
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


def cross_term(
    a: Tensor | None, b: Tensor | None, factor_a: Tensor | None = None, factor_b: Tensor | None = None
) -> Tensor:
    """tr((S_a S_b)^{1/2}), each side a covariance or, in its place, F with F^T F = S. Raises ``InputError`` for what is
    no covariance."""
    factors = [factor for factor in (factor_a, factor_b) if factor is not None]
    covs = [cov for cov, factor in ((a, factor_a), (b, factor_b)) if factor is None and cov is not None]
    try:
        if factors:
            return trace_sqrt_product_from_factors(*factors, cov=covs[0] if covs else None)
        return trace_sqrt_product(*covs)
    except ValueError as error:  # finite and symmetric they are: so one has a clearly negative eigenvalue
        raise InputError(f"a side is no covariance: {error}") from error


def frechet_distances(reference: FeatureStats, candidates: Sequence[FeatureStats]) -> Tensor:
    """Frechet distances of ``reference`` to each of ``candidates``, (len(candidates),) float64.

    The reference is factored once in all, or not at all where :attr:`FeatureStats.known_root` is there; it keeps the
    root for later calls. Candidates of one n <= dim, which still hold their features, are one batched call, and so are
    those of n > dim; on a CPU the latter are not factored either.

    Raises:
        InputError: as :func:`frechet_distance`; the candidate is named by its index.

    Example:
        >>> reference, *candidates = (FeatureStats().update(torch.full((10, 3), value)) for value in (0.0, 1.0, 2.0))
        >>> frechet_distances(reference, candidates)
        tensor([ 3., 12.], dtype=torch.float64)
    """
    values = torch.zeros(len(candidates), dtype=torch.float64)
    by_held_rows: dict[int, list[int]] = {}
    for index, candidate in enumerate(candidates):
        _check_pair(f"candidate {index}", reference, candidate)
        rows = (candidate.n or 0) if candidate.holds_vectors else 0
        by_held_rows.setdefault(rows, []).append(index)
    if not candidates:
        return values
    root, mean = reference.root(), reference.mean
    for rows, same_size in by_held_rows.items():
        for group in _groups(same_size, 8 * len(mean) * (rows or len(mean))):
            sides = [candidates[i] for i in group]
            batch = torch.stack([(stats.root() if rows else stats.cov).to(root.device) for stats in sides])
            if rows:
                cross, traces = cross_term(None, None, batch, root), batch.square().sum((-2, -1))
            else:
                cross, traces = cross_term(None, batch, root, None), batch.diagonal(dim1=-2, dim2=-1).sum(-1)
            shift = torch.stack([stats.mean for stats in sides]).to(mean.device) - mean
            distances = shift.square().sum(-1) + root.square().sum() + traces - 2 * cross
            values[group] = distances.clamp(min=0).cpu()
    return values


def paired_frechet_distances(real: Sequence[FeatureStats], fake: Sequence[FeatureStats]) -> Tensor:
    """Frechet distances of ``real[i]`` to ``fake[i]``, (len(real),) float64.

    Pairs that both still hold their features, as the classes of a data set mostly do, are worked on as batches: of
    centered features X (n, dim) and Y (m, dim) the cross term is ||X Y^T||_* / sqrt((n - 1)(m - 1)), and rows of zeros
    that make all products one size do not change it.

    Raises:
        InputError: as :func:`frechet_distance`; the pair is named by its index.

    Example:
        >>> real = [FeatureStats().update(torch.zeros(10, 3)) for _ in range(2)]
        >>> fake = [FeatureStats().update(torch.full((10, 3), value)) for value in (1.0, 2.0)]
        >>> paired_frechet_distances(real, fake)
        tensor([ 3., 12.], dtype=torch.float64)
    """
    if len(real) != len(fake):
        raise InputError(f"real and fake must be of one length, got {len(real)} and {len(fake)}")
    values = torch.zeros(len(real), dtype=torch.float64)
    small: list[tuple[int, int]] = []  # entries of X Y^T, index
    for index, (a, b) in enumerate(zip(real, fake, strict=True)):
        _check_pair(f"pair {index}", a, b)
        if a.holds_vectors and b.holds_vectors:
            small.append(((a.n or 0) * (b.n or 0), index))
        else:
            values[index] = frechet_distance(a, b)
    small.sort()  # pairs of like size side by side, so that little is padded
    for group in _groups([index for _, index in small], 8 * small[-1][0] if small else 1):
        means, roots = [], []
        for side in (real, fake):
            means.append(torch.stack([side[i].mean for i in group]))
            roots.append(torch.nn.utils.rnn.pad_sequence([side[i].root() for i in group], batch_first=True))
        (x, y), device = roots, roots[0].device
        cross = nuclear_norm(x @ y.mT)
        traces = x.square().sum((-2, -1)) + y.square().sum((-2, -1))
        distances = (means[0] - means[1].to(device)).square().sum(-1) + traces - 2 * cross
        values[group] = distances.clamp(min=0).cpu()
    return values


def _check_pair(name: str, a: FeatureStats, b: FeatureStats) -> None:
    try:
        for stats in (a, b):
            if stats.n is not None and stats.n < 2:
                raise InputError(f"at least 2 feature vectors are needed for a covariance, there are {stats.n}")
        check_comparable(a, b)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _groups(indices: list[int], matrix_bytes: int) -> Iterator[list[int]]:
    size = max(1, _MATRIX_BYTES // matrix_bytes)
    return (indices[start : start + size] for start in range(0, len(indices), size))


class FrechetLoss(nn.Module):
    """The Frechet distance of a batch of features to fixed statistics, differentiable in the features.

    The cross term is the nuclear norm of X R^T / sqrt(n - 1), with X the centered features and R^T R the reference's
    covariance: an (n, dim) matrix, so a batch smaller than ``dim`` costs little. The distance of so few vectors is
    biased far upwards, but for a fixed batch size so is that of real ones (Mathiasen & Hvilshoj, "Backpropagating
    through Frechet Inception Distance", 2020).

    Args:
        reference: statistics to approach.

    Raises:
        InputError: ``reference`` has fewer than two vectors.

    Example:
        >>> loss = FrechetLoss(FeatureStats().update(torch.randn(50, 4)))
        >>> features = torch.randn(50, 4, requires_grad=True)
        >>> loss(features).backward()
    """

    mean: Tensor
    factor: Tensor
    trace: Tensor

    def __init__(self, reference: FeatureStats) -> None:
        super().__init__()
        self.register_buffer("mean", reference.mean)
        self.register_buffer("factor", drop_redundant_row(reference.root()).mT.contiguous())
        self.register_buffer("trace", reference.cov.trace())

    def forward(self, features: Tensor) -> Tensor:
        """A scalar of the dtype of ``features`` (n, dim), computed in float64.

        Raises:
            InputError: ``features`` are not (n, dim) with n >= 2 and the reference's dim.
        """
        dim = self.mean.shape[0]
        if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] != dim:
            raise InputError(f"features must have shape (n, {dim}) with n >= 2, got {tuple(features.shape)}")
        rows = features.double()
        mean = rows.mean(dim=0)
        centered = (rows - mean) / (len(rows) - 1) ** 0.5
        cross = nuclear_norm(drop_redundant_row(centered) @ self.factor)
        distance = (mean - self.mean).square().sum() + centered.square().sum() + self.trace - 2 * cross
        return distance.to(features.dtype)
