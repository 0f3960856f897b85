"""Cholesky factor with complete pivoting of a symmetric positive semi-definite matrix, in plain PyTorch.

It takes the largest diagonal entry of what is left at each step and ends where none stands above rounding, which tells
the rank and costs a fraction of an eigendecomposition (Higham, "Analysis of the Cholesky decomposition of a
semi-definite matrix", 1990). csrc/pivoted_cholesky.h is the same algorithm, step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 4 * torch.finfo(torch.float64).eps
"""Pivots and eigenvalues up to d times this share of the largest entry or eigenvalue are no directions."""

_BLOCK = 64


def pivot_floor(a: Tensor) -> float:
    """A pivot up to this is rounding, and not a direction."""
    return len(a) * ROUNDING * max(a.diagonal().amax().item(), 0.0)


def pivoted_cholesky(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows C (r, d) with C^T C = A up to rounding, the order of the pivots, and what is left of A.

    Args:
        a: (d, d) float64, symmetric.

    Returns:
        C, of which the columns in the order of the pivots are upper trapezoidal; the order (d,) int64; and the largest
        magnitude in A - C^T C, a 0-dimensional tensor, for :func:`is_semidefinite`.
    """
    rest, floor, rank = a.clone(), pivot_floor(a), 0
    index, pivots = torch.arange(len(a), device=a.device), []
    rows = torch.zeros_like(a)
    while len(index):
        block, picked = _factor_block(rest, floor)
        if len(picked) == 0:
            break
        rows[rank : rank + len(block), index] = block
        rank += len(block)
        pivots.append(index[picked])
        kept = torch.ones(len(index), dtype=torch.bool, device=a.device).index_fill_(0, picked, False)
        index, block = index[kept], block[:, kept]
        rest = torch.addmm(rest[kept][:, kept], block.mT, block, alpha=-1)
    remainder = rest.abs().amax() if len(index) else a.new_zeros(())
    return rows[:rank], torch.cat([*pivots, index]), remainder


def is_semidefinite(a: Tensor, remainder: Tensor) -> bool:
    """Whether A is semi-definite to rounding, from what its factor leaves of it."""
    return remainder.item() <= 2 * pivot_floor(a)


def _factor_block(rest: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The next rows of the factor, up to a block of them, and the positions of their pivots."""
    diagonal = rest.diagonal().clone()
    block = rest.new_zeros(min(_BLOCK, len(rest)), len(rest))
    picked: list[int] = []
    for k in range(len(block)):
        pivot = int(diagonal.argmax())
        square = diagonal[pivot].item()
        if not square > floor:
            break
        row = (rest[pivot] - block[:k, pivot] @ block[:k]) / square**0.5
        row[picked] = 0
        row[pivot] = square**0.5
        block[k] = row
        picked.append(pivot)
        diagonal -= row * row
        diagonal[picked] = -torch.inf
    return block[: len(picked)], torch.tensor(picked, dtype=torch.int64, device=rest.device)
