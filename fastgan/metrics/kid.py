"""The kernel distance of two sets of features: KID where they are Inception's.

Binkowski et al., "Demystifying MMD GANs", 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgan._checks import InputError, check_count, check_features, check_seed
from fastgan.metrics.moments import as_features

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK = 4096
_DIAGONAL = 64  # rows whose kernels with themselves are computed at a time
_VALUES = 1 << 24  # of the kernel, held at a time
_GROUPS, _MOST = 12, 4000


@dataclass(frozen=True)
class KernelDistance:
    """The squared MMD, in no unit, averaged over ``subsets`` random subsets of ``subset_size``.

    Attributes:
        mean: the average, which is the KID.
        std: population standard deviation (divided by the number) over the subsets, as other packages report it. It
            shows how a KID of ``subset_size`` images scatters, says nothing about ``mean``, and is 0 if a subset is
            the whole set.
        standard_error: standard error of ``mean`` over other sets of as many images, by a jackknife over
            12 groups of each side.
    """

    mean: float
    std: float
    subsets: int
    subset_size: int
    standard_error: float


def kernel_distance(
    real: Tensor | npt.ArrayLike,
    fake: Tensor | npt.ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    seed: int = 0,
) -> KernelDistance:
    """Unbiased squared MMD with the kernel (gamma x.y + coef)^degree, over random subsets.

    Args:
        real, fake: features (n, dim) and (m, dim), of any floating dtype; tensors or arrays.
        subsets: how many pairs of subsets are drawn.
        subset_size: vectors per subset, drawn without replacement; all of the smaller set if it has fewer.
        degree, gamma, coef: of the kernel; gamma None is 1 / dim.
        seed: of the draws.

    Raises:
        InputError: the features are not two finite sets of at least 2 vectors and one dim, or are so large that the
            kernel overflows.
        ValueError: an argument is out of its range.

    >>> real, fake = torch.zeros(50, 4), torch.ones(50, 4)
    >>> kernel_distance(real, fake, subset_size=50).mean  # (1 + 1)^3 - 1, all vectors of a side being equal
    7.0
    """
    real, fake = as_features("real", real), as_features("fake", fake)
    check_kernel(subsets=subsets, subset_size=subset_size, degree=degree, gamma=gamma, coef=coef)
    check_seed("seed", seed)
    check_features(real=real, fake=fake, least=2)
    size = min(subset_size, len(real), len(fake))
    generator = torch.Generator().manual_seed(seed)
    kernel = functools.partial(
        polynomial, degree=degree, gamma=1 / real.shape[1] if gamma is None else gamma, coef=coef
    )
    x, y = real.double(), fake.double()
    count = 1 if size == len(x) == len(y) else subsets
    draws = [[torch.randperm(len(rows), generator=generator)[:size] for rows in (x, y)] for _ in range(count)]
    orders = [torch.randperm(len(rows), generator=generator)[:_MOST] for rows in (x, y)]
    of_x, of_y = (
        _indicators([*(draw[side] for draw in draws), *orders[side].tensor_split(_GROUPS)], rows)
        for side, rows in enumerate((x, y))
    )  # of the subsets, then of the groups of the standard error
    sizes = [side[count:].sum(dim=1) for side in (of_x, of_y)]
    if _whole_is_cheaper(len(x), len(y), count, size):
        within, between, diagonals = _kernel_sums(x, y, of_x, of_y, kernel)
        xx, yy, xy = (sums.diagonal()[:count] for sums in (*within, between))
        same = (xx - diagonals[0][:count] + yy - diagonals[1][:count]) / (size * (size - 1))
        drawn = same - 2 * xy / size**2
        within, between = [sums[count:, count:] for sums in within], between[count:, count:]
        diagonals = [sums[count:] for sums in diagonals]
    else:
        drawn = torch.stack([squared_mmd(x[i.to(x.device)], y[j.to(y.device)], kernel) for i, j in draws])
        i, j = (order.to(rows.device) for order, rows in zip(orders, (x, y), strict=True))
        within, between, diagonals = _kernel_sums(x[i], y[j], of_x[count:, i], of_y[count:, j], kernel)
    if not torch.isfinite(drawn).all():
        raise InputError("real and fake must be smaller: the kernel of these features overflows float64")
    error = _standard_error(within, between, diagonals, sizes, (len(x), len(y)))
    return KernelDistance(drawn.mean().item(), drawn.std(unbiased=False).item(), subsets, size, error)


def _indicators(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return (len(parts), n) float64: 1 where a row of ``rows`` (n, dim) is in a part, else 0."""
    found = torch.zeros(len(parts), len(rows), dtype=torch.float64)
    for indicator, part in zip(found, parts, strict=True):
        indicator[part] = 1
    return found.to(rows.device)


def _whole_is_cheaper(n: int, m: int, subsets: int, size: int) -> bool:
    """Return whether the kernel of all pairs has fewer values than those of the subsets."""
    return n * n + m * m + n * m <= 3 * subsets * size * size


_Sums = tuple[list[Tensor], Tensor, list[Tensor]]
"""Sums of the kernel over pairs of sets of rows: within each side, between the sides, and of rows with themselves."""


def _kernel_sums(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, kernel: Kernel) -> _Sums:
    """Sum the kernel over the pairs of any two sets of rows, which ``of_x`` (s, n) and ``of_y`` (s, m) indicate.

    Each value of the kernel is computed once for all sets, and a block of rows at a time.
    """

    def between(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
        size = max(1, _VALUES // len(b))
        parts = zip(a.split(size), of_a.split(size, dim=1), strict=True)
        return torch.stack([part @ kernel(block, b) for block, part in parts]).sum(dim=0) @ of_b.mT

    within, diagonals = [], []
    for rows, sets in ((x, of_x), (y, of_y)):
        within.append(between(rows, rows, sets, sets))
        diagonal = torch.cat([kernel(part, part).diagonal() for part in rows.split(_DIAGONAL)])
        diagonals.append(sets @ diagonal)
    return within, between(x, y, of_x, of_y), diagonals


def check_kernel(*, subsets: int, subset_size: int, degree: int, gamma: float | None, coef: float) -> None:
    """Raise ``ValueError`` naming the first argument of :func:`kernel_distance` that is out of its range."""
    for name, count, least in (("subsets", subsets, 1), ("subset_size", subset_size, 2), ("degree", degree, 1)):
        check_count(name, count, least)
    for name, value in (("gamma", gamma), ("coef", coef)):
        if name == "gamma" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


Kernel = Callable[[Tensor, Tensor], Tensor]
"""(n, dim) and (m, dim), float64, to (n, m): any positive definite kernel."""


def polynomial(x: Tensor, y: Tensor, *, degree: int, gamma: float, coef: float) -> Tensor:
    """(gamma x.y + coef)^degree."""
    return ((x @ y.mT) * gamma + coef).pow(degree)


def gaussian(x: Tensor, y: Tensor, *, sigma: float) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2))."""
    return torch.cdist(x, y).square().mul(-0.5 / sigma**2).exp()


def squared_mmd(
    x: Tensor,
    y: Tensor,
    kernel: Kernel | None = None,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    unbiased: bool = True,
) -> Tensor:
    """Squared MMD of all of ``x`` (n, dim) and ``y`` (m, dim), a float64 scalar; memory linear in n and m.

    Args:
        kernel: such as :func:`gaussian` with its sigma bound; None takes :func:`polynomial`.
        degree, gamma, coef: of the polynomial kernel; gamma None is 1 / dim.
        unbiased: leave a vector's kernel with itself out of the averages.

    Example:
        >>> x = torch.randn(20, 4)
        >>> squared_mmd(x, x, unbiased=False)
        tensor(0., dtype=torch.float64)
    """
    x, y = x.double(), y.double()
    if kernel is None:
        kernel = functools.partial(
            polynomial, degree=degree, gamma=1 / x.shape[1] if gamma is None else gamma, coef=coef
        )

    def within(rows: Tensor) -> Tensor:
        total = _block_sum(rows, rows, kernel)
        if not unbiased:
            return total / len(rows) ** 2
        diagonal = torch.stack([kernel(part, part).diagonal().sum() for part in rows.split(_DIAGONAL)]).sum()
        return (total - diagonal) / (len(rows) * (len(rows) - 1))

    return within(x) + within(y) - 2 * _block_sum(x, y, kernel) / (len(x) * len(y))


def _standard_error(
    within: list[Tensor], between: Tensor, diagonals: list[Tensor], sizes: list[Tensor], numbers: tuple[int, int]
) -> float:
    """Return the standard error of the unbiased squared MMD, by a jackknife that leaves out a group at a time.

    ``sizes`` are those of the groups of each side, which may hold at most 4000 of its ``numbers`` of vectors: the error
    is scaled to these. NaN for fewer than 24 vectors on a side.
    """
    if min(numbers) < 2 * _GROUPS:
        return float("nan")

    def without(keep_x: Tensor, keep_y: Tensor) -> Tensor:
        value = between.new_zeros(())
        for keep, sums, diagonal, size in zip((keep_x, keep_y), within, diagonals, sizes, strict=True):
            n = size[keep].sum()
            value = value + (sums[keep][:, keep].sum() - diagonal[keep].sum()) / (n * (n - 1))
        return value - 2 * between[keep_x][:, keep_y].sum() / (sizes[0][keep_x].sum() * sizes[1][keep_y].sum())

    everything, variance = torch.ones(_GROUPS, dtype=torch.bool, device=between.device), 0.0
    for side, number in enumerate(numbers):
        left_out = []
        for i in range(_GROUPS):
            keep = everything.clone()
            keep[i] = False
            left_out.append(without(keep, everything) if side == 0 else without(everything, keep))
        spread = torch.stack(left_out).var(unbiased=False).item() * (_GROUPS - 1)
        variance += spread * min(number, _MOST) / number
    return variance**0.5


def draw_at_most(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``rows`` (n, dim) in a random order as float64, or 4000 of them if there are more."""
    return rows[torch.randperm(len(rows), generator=generator)[:_MOST].to(rows.device)].double()


def _block_sum(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    return torch.stack([kernel(block, y).sum() for block in x.split(_BLOCK)]).sum()
