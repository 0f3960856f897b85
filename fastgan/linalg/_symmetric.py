"""Symmetric matrices: scaled by powers of two, factored as F F^T, and multiplied by triangular factors."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 4 * torch.finfo(torch.float64).eps
"""Relative rounding level: pivots and eigenvalues up to d times this share of the largest are no directions."""

INDEFINITE = 1e-5
"""An eigenvalue below minus this share of the largest is no rounding error."""

_COLUMNS, _ROWS = 256, 512


def symmetric_part(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def power_of_two(matrices: Tensor) -> Tensor:
    """The power of two at or below the largest magnitude of each (rows, cols) matrix, 1 for zero.

    Dividing by it is exact.
    """
    if matrices.numel() == 0:
        return matrices.new_ones(matrices.shape[:-2])
    largest = torch.maximum(matrices.amax((-2, -1)), -matrices.amin((-2, -1)))
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest > 0, largest / (2 * mantissa), 1.0)


def scaled(matrices: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Powers of two (n,), and the symmetric parts of float64 matrices (n, d, d) divided by them.

    ``impl`` is resolved. On a CPU the extension reads and writes each matrix once.
    """
    if impl == "extension" and not matrices.is_cuda:
        return torch.ops.fastgan_C.scaled(matrices)
    wide = matrices.double()
    scale = power_of_two(wide)
    return scale, symmetric_part(wide / scale[..., None, None])


def cholesky_if_definite(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower factors (..., d, d), and a mask of those that failed or have a pivot at rounding level.

    The level is higher than that of pivoted factors: without a choice of pivots, small ones amplify rounding errors.
    """
    lower, failed = torch.linalg.cholesky_ex(matrices)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1)
    return lower, (failed != 0) | ~(pivots > 16 * matrices.shape[-1] * ROUNDING * largest)


def eigen_factor(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F with A = F F^T for symmetric A (..., d, d), the eigenvalues (..., d), and which of them F keeps.

    Eigenvalues ascend with the columns of F. Those at rounding level or below are not kept: their columns are zero.
    """
    values, vectors = torch.linalg.eigh(matrices)
    kept = values > values.shape[-1] * ROUNDING * values.abs().amax(-1, keepdim=True)
    return vectors * torch.where(kept, values, 0.0).sqrt()[..., None, :], values, kept


def triangular_sandwich(lower: Tensor, b: Tensor) -> Tensor:
    """Lower triangle of L^T B L for lower trapezoidal L (d, r); the entries above the diagonal are unspecified.

    Column block J needs B and L from J on only, and its row block I needs L from I on: a quarter of the operations of
    two full products.
    """
    rank = lower.shape[1]
    out = b.new_empty(rank, rank)
    for j in range(0, rank, _COLUMNS):
        panel = b[j:, j:] @ lower[j:, j : j + _COLUMNS]
        for i in range(j, rank, _ROWS):
            block = out[i : i + _ROWS, j : j + _COLUMNS]
            torch.mm(lower[i:, i : i + _ROWS].mT, panel[i - j :], out=block)
    return out
