"""Cholesky factor with complete pivoting of a symmetric positive semi-definite matrix, on a CPU.

Each step takes the largest diagonal entry of the remainder, until none is above rounding. That reveals the rank at a
fraction of the cost of an eigendecomposition (Higham, "Analysis of the Cholesky decomposition of a semi-definite
matrix", 1990). csrc/pivoted_cholesky.h takes the same steps, without a call of torch for each pivot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.linalg._symmetric import ROUNDING

_BLOCK = 64


def semidefinite_rows(a: Tensor, impl: str) -> tuple[Tensor, Tensor] | None:
    """R (r, d) with R^T R = A up to rounding, r the rank of A, and the order of its pivots (d,), int64.

    With its columns in that order, R is upper trapezoidal.

    Args:
        a: (d, d) float64, symmetric, contiguous, on a CPU.
        impl: resolved.

    Returns:
        None if A is not semi-definite to rounding.
    """
    compute = torch.ops.fastgan_C.pivoted_cholesky if impl == "extension" else pivoted_cholesky
    rows, order, remainder = compute(a)
    return (rows, order) if remainder.item() <= 2 * pivot_floor(a) else None


def pivot_floor(a: Tensor) -> float:
    """The size up to which a pivot is rounding, and not a direction."""
    return len(a) * ROUNDING * max(a.diagonal().amax().item(), 0.0)


def pivoted_cholesky(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and order as in :func:`semidefinite_rows`, and the largest magnitude of A - R^T R, 0-dimensional."""
    rest, floor, rank = a.clone(), pivot_floor(a), 0
    index, pivots = torch.arange(len(a)), []
    rows = torch.zeros_like(a)
    while len(index):
        block, picked = _factor_block(rest, floor)
        if len(picked) == 0:
            break
        rows[rank : rank + len(block), index] = block
        rank += len(block)
        pivots.append(index[picked])
        kept = torch.ones(len(index), dtype=torch.bool).index_fill_(0, picked, False)
        index, block = index[kept], block[:, kept]
        rest = torch.addmm(rest[kept][:, kept], block.mT, block, alpha=-1)
    remainder = rest.abs().amax() if len(index) else a.new_zeros(())
    return rows[:rank], torch.cat([*pivots, index]), remainder


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
    return block[: len(picked)], torch.tensor(picked, dtype=torch.int64)
