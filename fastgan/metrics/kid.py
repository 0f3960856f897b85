"""The kernel distance of two sets of features: KID where they are Inception's.

Binkowski et al., "Demystifying MMD GANs", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgan._checks import check_features

_BLOCK = 4096


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the squared MMD over the subsets, in no unit; and how many, of what size."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kernel_distance(
    real: Tensor,
    fake: Tensor,
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
        real, fake: features (n, dim) and (m, dim), of any floating dtype.
        subsets: how many pairs of subsets are drawn.
        subset_size: vectors of each; all of the smaller set where that has fewer. Drawn without replacement.
        degree, gamma, coef: of the kernel; gamma None is 1 / dim.
        seed: of the draws.

    Raises:
        InputError: the features are not two finite sets of at least 2 vectors and one dim.
        ValueError: ``subsets`` under 1 or ``subset_size`` under 2.
    """
    check_features(real=real, fake=fake, least=2)
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    if subset_size < 2:
        raise ValueError(f"subset_size must be at least 2, got {subset_size}")
    size = min(subset_size, len(real), len(fake))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)] for rows in (real, fake))
        values.append(squared_mmd(x, y, degree=degree, gamma=gamma, coef=coef))
    drawn = torch.stack(values)
    return KernelDistance(drawn.mean().item(), drawn.std(unbiased=False).item(), subsets, size)


def squared_mmd(x: Tensor, y: Tensor, *, degree: int = 3, gamma: float | None = None, coef: float = 1.0) -> Tensor:
    """Unbiased squared MMD of all of ``x`` (n, dim) and ``y`` (m, dim), a float64 scalar; memory linear in n and m."""
    x, y = x.double(), y.double()
    gamma = 1 / x.shape[1] if gamma is None else gamma

    def kernel_sum(left: Tensor, right: Tensor) -> Tensor:
        blocks = (((block @ right.mT) * gamma + coef).pow(degree).sum() for block in left.split(_BLOCK))
        return torch.stack(list(blocks)).sum()

    def off_diagonal(rows: Tensor) -> Tensor:
        diagonal = (rows.square().sum(1) * gamma + coef).pow(degree).sum()
        return (kernel_sum(rows, rows) - diagonal) / (len(rows) * (len(rows) - 1))

    return off_diagonal(x) + off_diagonal(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))
