"""Many Frechet distances in one call: checkpoints against one reference, or each class against its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.linalg import nuclear_norm, trace_sqrt_product_from_factors
from fastgan.metrics.frechet import frechet_distance
from fastgan.metrics.stats import FeatureStats, check_comparable

_MATRIX_BYTES = 1 << 30
"""Of covariances or products of features that are in memory at a time."""


def frechet_distances(reference: FeatureStats, candidates: Sequence[FeatureStats]) -> Tensor:
    """Frechet distances of ``reference`` to each of ``candidates``, (len(candidates),) float64.

    The reference is factored once in all, or not at all where :attr:`FeatureStats.known_root` is there; it keeps the
    root for later calls. Candidates of one n <= dim, which still hold their features, are one batched call, and so are
    those of n > dim; on a CPU the latter are not factored either.

    Raises:
        InputError: as :func:`frechet_distance`; the candidate is named by its index.
    """
    values = torch.zeros(len(candidates), dtype=torch.float64)
    for index, candidate in enumerate(candidates):
        try:
            _check(reference, candidate)
        except InputError as error:
            raise InputError(f"candidate {index}: {error}") from error
    if not candidates:
        return values
    root, dim = reference.root(), len(reference.mean)
    for rows, same_size in _by_held_rows(candidates).items():
        for group in _groups(same_size, 8 * dim * (rows or dim)):
            values[group] = _against_root(reference.mean, root, [candidates[i] for i in group], held=rows > 0)
    return values


def _by_held_rows(candidates: Sequence[FeatureStats]) -> dict[int, list[int]]:
    """The candidates' indices by the number of vectors that they hold, 0 for those that hold none any more."""
    sizes: dict[int, list[int]] = {}
    for index, candidate in enumerate(candidates):
        held = 0 if candidate.factor is None else candidate.n or 0
        sizes.setdefault(held, []).append(index)
    return sizes


def _against_root(mean: Tensor, root: Tensor, candidates: Sequence[FeatureStats], *, held: bool) -> Tensor:
    parts = [stats.root() if held else stats.cov for stats in candidates]
    batch = torch.stack([part.to(root.device) for part in parts])
    try:
        if held:
            cross = trace_sqrt_product_from_factors(batch, root)
        else:
            cross = trace_sqrt_product_from_factors(root, cov=batch)
    except ValueError as error:
        raise InputError(f"a side is no covariance: {error}") from error
    traces = batch.square().sum((-2, -1)) if held else batch.diagonal(dim1=-2, dim2=-1).sum(-1)
    means = torch.stack([stats.mean for stats in candidates]).to(mean.device)
    return ((means - mean).square().sum(-1) + root.square().sum() + traces - 2 * cross).clamp(min=0).cpu()


def paired_frechet_distances(real: Sequence[FeatureStats], fake: Sequence[FeatureStats]) -> Tensor:
    """Frechet distances of ``real[i]`` to ``fake[i]``, (len(real),) float64.

    Pairs that both still hold their features, as the classes of a data set mostly do, are worked on as batches: of
    centred features X (n, dim) and Y (m, dim) the cross term is ||X Y^T||_* / sqrt((n - 1)(m - 1)), and rows of zeros
    that make all products one size do not change it.

    Raises:
        InputError: as :func:`frechet_distance`; the pair is named by its index.
    """
    values = torch.zeros(len(real), dtype=torch.float64)
    small = []
    for index, (a, b) in enumerate(zip(real, fake, strict=True)):
        try:
            _check(a, b)
        except InputError as error:
            raise InputError(f"pair {index}: {error}") from error
        if a.factor is None or b.factor is None:
            values[index] = frechet_distance(a, b)
        else:
            small.append(index)
    # pairs of like size side by side, so that little is padded
    small.sort(key=lambda i: (real[i].n or 0) * (fake[i].n or 0))
    largest = max(((real[i].n or 0) * (fake[i].n or 0) for i in small), default=1)
    for group in _groups(small, 8 * largest):
        values[group] = _low_rank([real[i] for i in group], [fake[i] for i in group])
    return values


def _check(a: FeatureStats, b: FeatureStats) -> None:
    for stats in (a, b):
        if stats.n is not None and stats.n < 2:
            raise InputError(f"at least 2 feature vectors are needed for a covariance, there are {stats.n}")
    check_comparable(a, b)


def _groups(indices: list[int], matrix_bytes: int) -> list[list[int]]:
    size = max(1, _MATRIX_BYTES // matrix_bytes)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _low_rank(real: Sequence[FeatureStats], fake: Sequence[FeatureStats]) -> Tensor:
    x, y = _padded_factors(real), _padded_factors(fake)
    cross = nuclear_norm(x @ y.mT)
    means = [torch.stack([stats.mean for stats in side]).to(x.device) for side in (real, fake)]
    traces = x.square().sum((-2, -1)) + y.square().sum((-2, -1))
    return ((means[0] - means[1]).square().sum(-1) + traces - 2 * cross).clamp(min=0).cpu()


def _padded_factors(side: Sequence[FeatureStats]) -> Tensor:
    factors = []
    for stats in side:
        assert stats.factor is not None
        assert stats.n is not None
        factors.append(stats.factor / (stats.n - 1) ** 0.5)
    return torch.nn.utils.rnn.pad_sequence(factors, batch_first=True)
