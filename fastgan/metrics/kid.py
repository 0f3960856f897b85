"""The kernel distance of two sets of features: KID where they are Inception's.

Binkowski et al., "Demystifying MMD GANs", 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgan._checks import check_count, check_features
from fastgan.metrics.moments import as_features

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK = 4096
_DIAGONAL = 64  # rows whose kernels with themselves are computed at a time
_GROUPS, _MOST = 12, 4000


@dataclass(frozen=True)
class KernelDistance:
    """The squared MMD, in no unit, averaged over ``subsets`` random subsets of ``subset_size``.

    Attributes:
        mean: the average, which is the KID.
        std: population standard deviation (divided by the number) over the subsets, as other packages report it. It
            tells how a KID of ``subset_size`` images scatters, says nothing of ``mean``, and is 0 where a subset is
            the whole set.
        standard_error: what ``mean`` would change by with other images of the same number, by a jackknife over
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
        InputError: the features are not two finite sets of at least 2 vectors and one dim.
        ValueError: an argument is out of its range.

    >>> real, fake = torch.zeros(50, 4), torch.ones(50, 4)
    >>> kernel_distance(real, fake, subset_size=50).mean  # (1 + 1)^3 - 1, all vectors of a side being equal
    7.0
    """
    real, fake = as_features("real", real), as_features("fake", fake)
    check_kernel(subsets=subsets, subset_size=subset_size, degree=degree, gamma=gamma, coef=coef)
    check_features(real=real, fake=fake, least=2)
    size = min(subset_size, len(real), len(fake))
    generator = torch.Generator().manual_seed(seed)
    kernel = functools.partial(
        polynomial, degree=degree, gamma=1 / real.shape[1] if gamma is None else gamma, coef=coef
    )
    values = []
    whole = _Kernels(real.double(), fake.double(), kernel) if max(len(real), len(fake)) <= _MOST else None
    for _ in range(1 if size == len(real) == len(fake) else subsets):
        i, j = (torch.randperm(len(rows), generator=generator)[:size].to(rows.device) for rows in (real, fake))
        values.append(squared_mmd(real[i], fake[j], kernel) if whole is None else whole.squared_mmd(i, j))
    drawn = torch.stack(values)
    error = standard_error(real, fake, kernel, generator)
    return KernelDistance(drawn.mean().item(), drawn.std(unbiased=False).item(), subsets, size, error)


class _Kernels:
    """The kernel of all pairs, of which many subsets of small sets are taken without computing it again."""

    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel) -> None:
        self.pairs = kernel(x, x), kernel(y, y), kernel(x, y)

    def squared_mmd(self, i: Tensor, j: Tensor) -> Tensor:
        """The unbiased squared MMD of rows ``i`` of x and ``j`` of y."""
        xx, yy, xy = (pairs[a][:, b] for pairs, a, b in zip(self.pairs, (i, j, i), (i, j, j), strict=True))
        n, m = len(i), len(j)
        within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
        return within - 2 * xy.sum() / (n * m)


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


def standard_error(real: Tensor, fake: Tensor, kernel: Kernel, generator: torch.Generator) -> float:
    """The standard error of the unbiased squared MMD of ``real`` and ``fake``: a jackknife that leaves out a group of
    each at a time. Of more than 4000 vectors 4000 are drawn, and the error is scaled to their number.

    NaN for fewer than 24 vectors on a side.
    """
    groups = []
    for rows in (real, fake):
        if len(rows) < 2 * _GROUPS:
            return float("nan")
        groups.append(draw_at_most(rows, generator).tensor_split(_GROUPS))
    x, y = groups
    # sums of the kernel over pairs of groups, of which each leave-one-out MMD is made
    within = [torch.stack([torch.stack([kernel(a, b).sum() for b in side]) for a in side]) for side in groups]
    between = torch.stack([torch.stack([kernel(a, b).sum() for b in y]) for a in x])
    diagonals = [torch.stack([kernel(a, a).diagonal().sum() for a in side]) for side in groups]
    sizes = [torch.tensor([len(a) for a in side], dtype=torch.float64, device=between.device) for side in groups]

    def without(keep_x: Tensor, keep_y: Tensor) -> Tensor:
        value = between.new_zeros(())
        for keep, sums, diagonal, size in zip((keep_x, keep_y), within, diagonals, sizes, strict=True):
            n = size[keep].sum()
            value = value + (sums[keep][:, keep].sum() - diagonal[keep].sum()) / (n * (n - 1))
        return value - 2 * between[keep_x][:, keep_y].sum() / (sizes[0][keep_x].sum() * sizes[1][keep_y].sum())

    everything, variance = torch.ones(_GROUPS, dtype=torch.bool, device=between.device), 0.0
    for side, rows in enumerate((real, fake)):
        left_out = []
        for i in range(_GROUPS):
            keep = everything.clone()
            keep[i] = False
            left_out.append(without(keep, everything) if side == 0 else without(everything, keep))
        spread = torch.stack(left_out).var(unbiased=False).item() * (_GROUPS - 1)
        variance += spread * min(len(rows), _MOST) / len(rows)
    return variance**0.5


def draw_at_most(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``rows`` (n, dim) in a random order as float64, or 4000 of them if there are more."""
    return rows[torch.randperm(len(rows), generator=generator)[:_MOST].to(rows.device)].double()


def _block_sum(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    return torch.stack([kernel(block, y).sum() for block in x.split(_BLOCK)]).sum()
