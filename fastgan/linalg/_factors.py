"""Factors F (..., n, d) of covariances F^T F: centred features of few samples, or a triangular root."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._checks import is_differentiated, needs_no_dispatch
from fastgan.linalg import _checks as checks
from fastgan.linalg import _nuclear_norm as norm_ops
from fastgan.linalg import _sqrtm as sqrtm_ops
from fastgan.linalg._nuclear_norm import direct_rows, value_tolerance
from fastgan.linalg._nuclear_norm_reference import GRAM, power_of_two, root_sum
from fastgan.linalg._pivoted import semidefinite_rows
from fastgan.linalg._pivoted_reference import ROUNDING
from fastgan.linalg._sqrtm_reference import symmetric_part
from fastgan.linalg._trace import scaled
from fastgan.linalg._trace_reference import cholesky_if_definite, triangular_sandwich

_BLOCK = 256
_CHUNK_ENTRIES = 2**23
_NO_MEAN = 1e-12


def without_mean(factor: Tensor) -> Tensor:
    """The same F^T F from n - 1 rows, where the rows add up to zero, as centred features do; else F itself.

    A reflection of the rows that turns (1, ..., 1) into the first axis leaves the mean as first row. Without it, no
    singular value is zero for want of a dimension: a zero one is what an eigensolver gets wrong by half the digits.
    """
    n = factor.shape[-2]
    if n < 2 or checks.watched():
        return factor
    mean_row = factor.sum(-2, keepdim=True) / n**0.5
    size = torch.linalg.vector_norm(factor.detach(), dim=(-2, -1), keepdim=True)
    if bool((torch.linalg.vector_norm(mean_row.detach(), dim=-1, keepdim=True) > _NO_MEAN * size).any()):
        return factor
    return factor[..., 1:, :] + (factor[..., :1, :] - mean_row) / (n**0.5 - 1)


def root_of(cov: Tensor, name: str) -> tuple[Tensor, bool]:
    """R with R R^T = cov, and whether it is lower triangular: a Cholesky factor; of a singular matrix a factor of as
    many columns as it has rank, or its symmetric root, which has a gradient.

    Raises:
        ValueError: the covariance is clearly indefinite.
    """
    lower, singular = cholesky_if_definite(cov)
    if checks.watched() or not bool(singular.any()):
        return lower, True
    if cov.ndim == 2 and needs_no_dispatch(cov):
        return _singular_row_root(name, cov).mT, False
    checks.check_semidefinite(name, cov)
    return sqrtm_ops.call(cov, "auto", False, "auto"), False


def row_root(name: str, cov: Tensor) -> Tensor:
    """R (r, d) with R^T R = cov (d, d): a transposed Cholesky factor, or r = rank rows of one with pivots, or of scaled
    eigenvectors where cov is not quite semi-definite.

    Raises:
        ValueError: the covariance is clearly indefinite.
    """
    lower, singular = cholesky_if_definite(cov)
    return _singular_row_root(name, cov) if bool(singular) else lower.mT.contiguous()


def _singular_row_root(name: str, cov: Tensor) -> Tensor:
    rows = None if cov.is_cuda else semidefinite_rows(cov)
    if rows is not None and len(rows):
        return rows.contiguous()
    checks.check_semidefinite(name, cov)
    values, vectors = torch.linalg.eigh(cov)
    kept = values > len(values) * ROUNDING * values[-1]
    kept[-1] = True  # of a zero matrix, a row of zeros
    return (vectors[:, kept] * values[kept].clamp(min=0).sqrt()).mT.contiguous()


def against_factor(factor: Tensor, other: Tensor, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """Values and reports of F (..., n, d) and a factor R (..., m, d) of the other covariance R^T R."""
    rows = without_mean(other.double())
    return _products(factor, rows.mT, _is_upper(rows), impl, bounds)


def against_covariance(factor: Tensor, name: str, cov: Tensor, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """Values and reports of F (..., n, d) and covariances (..., d, d), called ``name`` in errors.

    F that has about as many rows as columns goes by eigenvalues of F cov F^T, which needs no factor of cov.
    """
    one_by_one = factor.ndim == 2 and 2 * len(factor) > cov.shape[-1] and not factor.is_cuda
    if not one_by_one or is_differentiated(factor, cov) or checks.watched():
        return _products(factor, *root_of(symmetric_part(cov.double()), name), impl, bounds)
    rows = without_mean(factor.double())
    upper, tolerance = _is_upper(rows), value_tolerance(factor.dtype)
    flat = cov.reshape(-1, *cov.shape[-2:])
    value, report = flat.new_zeros(len(flat), dtype=torch.float64), flat.new_zeros(len(flat), 4, dtype=torch.float64)
    for i, matrix in enumerate(flat):
        found = _by_congruence(rows, upper, name, matrix, tolerance)
        value[i], report[i] = found or _products(factor, *root_of(symmetric_part(matrix.double()), name), impl, bounds)
    return value.reshape(cov.shape[:-2]), report.reshape(*cov.shape[:-2], 4)


def _is_upper(matrix: Tensor) -> bool:
    """Whether a matrix is known to be square with zeros alone below its diagonal."""
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return square and not checks.watched() and not bool(matrix.tril(-1).any())


def _by_congruence(rows: Tensor, upper: bool, name: str, cov: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """None where the error bound is too wide a share of the value."""
    row_scale, (cov_scale, (wide,)) = power_of_two(rows[None]), scaled(cov[None])
    rows = rows / row_scale
    gram = triangular_sandwich(rows.mT, wide) if upper else rows @ wide @ rows.mT
    value, bound, accurate = root_sum(torch.linalg.eigvalsh(gram)[None], tolerance)
    if not bool(accurate):
        return None
    if len(rows) < len(wide):  # of a square factor, eigenvalues that are all positive have told
        checks.check_semidefinite(name, wide)
    scale = row_scale * cov_scale.sqrt()
    return (value * scale)[0], direct_rows(value * scale, bound * scale, GRAM)[0]


def _products(factor: Tensor, other: Tensor, triangular: bool, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """``fastgan::nuclear_norm`` of F ``other``, F (..., n, d) and ``other`` (..., d, m), maybe lower triangular.

    Without gradients, a batch against one matrix goes in chunks that stay near the processor.
    """

    def solve(factor: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        rows = without_mean(factor.double())
        product = _times_lower(rows, other) if triangular else rows @ other
        return norm_ops.call(product, "auto", impl, bounds)

    differentiable = is_differentiated(factor, other)
    triangular = triangular and other.ndim == 2 and not differentiable
    if differentiable or checks.watched() or (factor.ndim == 2) == (other.ndim == 2):
        return solve(factor, other)
    batch = factor if factor.ndim > 2 else other
    matrices = batch.reshape(-1, *batch.shape[-2:])
    chunks = matrices.split(max(1, _CHUNK_ENTRIES // batch.shape[-2:].numel()))
    parts = [solve(chunk, other) if batch is factor else solve(factor, chunk) for chunk in chunks]
    values, reports = zip(*parts, strict=True)
    return torch.cat(values).reshape(batch.shape[:-2]), torch.cat(reports).reshape(*batch.shape[:-2], 4)


def _times_lower(factor: Tensor, lower: Tensor) -> Tensor:
    """F L, leaving out most of the zeros of L (d, d)."""
    d = lower.shape[-1]
    rows = factor.reshape(-1, d)
    out = torch.empty_like(rows)
    for j in range(0, d, _BLOCK):
        torch.mm(rows[:, j:], lower[j:, j : j + _BLOCK], out=out[:, j : j + _BLOCK])
    return out.reshape(factor.shape)
