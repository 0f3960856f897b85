"""Factors F (..., n, d) of covariances F^T F with fewer samples than dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import _linalg_checks as checks
from fastgan.ops.nuclear_norm import nuclear_norm
from fastgan.ops.sqrtm import sqrtm
from fastgan.reference.trace_sqrt_product import cholesky_if_definite

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
    """R with R R^T = cov, and whether it is lower triangular: a Cholesky factor, or a singular matrix's symmetric root.

    Raises:
        ValueError: the covariance is clearly indefinite.
    """
    lower, singular = cholesky_if_definite(cov)
    if not checks.watched() and bool(singular.any()):
        checks.check_semidefinite(name, cov)
        return sqrtm(cov, "auto", False, "auto"), False
    return lower, True


def values_and_reports(
    factor: Tensor, other: Tensor, triangular: bool, impl: str, bounds: bool
) -> tuple[Tensor, Tensor]:
    """``fastgan::nuclear_norm`` of F ``other``, F (..., n, d) and ``other`` (..., d, m), in float64.

    Without gradients, a batch of F against one ``other`` goes in chunks that stay near the processor.
    """

    def solve(part: Tensor) -> tuple[Tensor, Tensor]:
        part = without_mean(part.double())
        product = _times_lower(part, other) if triangular and not differentiable else part @ other
        return nuclear_norm(product, "auto", impl, bounds)

    differentiable = torch.is_grad_enabled() and (factor.requires_grad or other.requires_grad)
    n, d = factor.shape[-2:]
    if differentiable or factor.ndim == 2 or other.ndim > 2 or checks.watched():
        triangular = triangular and other.ndim == 2
        return solve(factor)
    chunks = factor.reshape(-1, n, d).split(max(1, _CHUNK_ENTRIES // (n * d)))
    values, reports = zip(*(solve(chunk) for chunk in chunks), strict=True)
    return torch.cat(values).reshape(factor.shape[:-2]), torch.cat(reports).reshape(*factor.shape[:-2], -1)


def _times_lower(factor: Tensor, lower: Tensor) -> Tensor:
    """F L, leaving out most of the zeros of L (d, d)."""
    d = lower.shape[-1]
    rows = factor.reshape(-1, d)
    out = torch.empty_like(rows)
    for j in range(0, d, _BLOCK):
        torch.mm(rows[:, j:], lower[j:, j : j + _BLOCK], out=out[:, j : j + _BLOCK])
    return out.reshape(factor.shape)
