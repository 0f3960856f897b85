"""Factors F (..., n, d) of covariances F^T F: centered features of few samples, or a triangular root."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._dispatch import is_differentiated, needs_no_dispatch
from fastgan.linalg import _checks as checks
from fastgan.linalg import _nuclear_norm as norm_ops
from fastgan.linalg import _sqrtm as sqrtm_ops
from fastgan.linalg._dispatch import nan_unless, resolve, watched
from fastgan.linalg._pivoted import semidefinite_rows
from fastgan.linalg._symmetric import (
    cholesky_if_definite,
    eigen_factor,
    power_of_two,
    scaled,
    symmetric_part,
    triangular_sandwich,
)
from fastgan.linalg._transforms import is_tracked, transform_is_active, values_of

_BLOCK = 256
_CHUNK_ENTRIES = 2**23
_NO_MEAN = 1e-12


def covariance_factor(cov: Tensor) -> Tensor:
    """Return R (r, d) with R^T R = cov, to be used with any number of other covariances or factors.

    It is the transposed Cholesky factor, upper triangular; for a singular covariance a pivoted one, r its rank.

    Args:
        cov: shape (d, d), float32 or float64, symmetric positive semi-definite.

    Returns:
        R in float64, contiguous. Without a gradient.

    Raises:
        ValueError: ``cov`` has another shape or dtype, is not finite, or clearly asymmetric or indefinite.
        NotImplementedError: ``cov`` is mapped over or differentiated by ``torch.func``, or has a tangent.

    >>> import torch
    >>> covariance_factor(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    tensor([[2., 1.]], dtype=torch.float64)
    """
    checks.check_square("cov", cov)
    if cov.ndim != 2:
        raise ValueError(f"cov must have shape (d, d), got {tuple(cov.shape)}")
    if is_tracked(cov):
        raise NotImplementedError(
            "covariance_factor has no derivative and no vmap, since the rank of cov decides its shape: factor cov "
            "outside of the transform, or give it to trace_sqrt_product_from_factors(f, cov=cov)"
        )
    impl = resolve("auto", cov.device)
    checks.check_symmetric("cov", cov, impl)
    cov = cov.detach().double()
    lower, singular = cholesky_if_definite(cov)
    return _singular_factor(cov, impl) if bool(singular) else lower.mT.contiguous()


def _singular_factor(cov: Tensor, impl: str) -> Tensor:
    """R (r, d) with R^T R = cov, r its rank: by pivoted Cholesky, or eigenvectors if cov is not quite semi-definite."""
    found = None if cov.is_cuda else semidefinite_rows(cov.contiguous(), impl)
    if found is not None and len(found[0]):
        return found[0].contiguous()
    checks.check_eigenvalues("cov", cov)
    columns, _, kept = eigen_factor(cov)
    kept[-1] = True  # of a zero matrix, a row of zeros
    return columns[:, kept].mT.contiguous()


def drop_redundant_row(factor: Tensor) -> Tensor:
    """Return n - 1 rows with the same F^T F for F (..., n, d) whose rows add up to zero, as centered features do.

    A reflection of the rows that turns (1, ..., 1) into the first axis makes the mean the first row, which is dropped.
    The centering then causes no zero singular value, which an eigensolver would find with only half the digits. Any
    other F is returned unchanged, and so is a batch, or a mapped dimension of ``torch.vmap``, that contains one.
    Differentiable.

    >>> import torch
    >>> drop_redundant_row(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    tensor([[1.4142, 2.8284]])
    """
    n = factor.shape[-2]
    if n < 2 or watched():
        return factor
    mean_row = factor.sum(-2, keepdim=True) / n**0.5
    size = torch.linalg.vector_norm(values_of(factor), dim=(-2, -1))
    if bool((torch.linalg.vector_norm(values_of(mean_row), dim=(-2, -1)) > _NO_MEAN * size).any()):
        return factor
    return factor[..., 1:, :] + (factor[..., :1, :] - mean_row) / (n**0.5 - 1)


def against_factor(factor: Tensor, other: Tensor, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """Values and reports of F (..., n, d) and a factor R (..., m, d) of the other covariance R^T R."""
    rows = drop_redundant_row(other.double())
    return _products(factor, rows.mT, _is_upper(rows), impl, bounds)


def against_covariance(factor: Tensor, cov: Tensor, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """Values and reports of F (..., n, d) and covariances (..., d, d), called cov in errors.

    F that has about as many rows as columns goes by eigenvalues of F cov F^T, which needs no factor of cov.
    """
    one_by_one = factor.ndim == 2 and 2 * len(factor) > cov.shape[-1] and not factor.is_cuda
    if not one_by_one or _is_differentiated(factor, cov) or watched():
        return _products(factor, *_root(symmetric_part(cov.double()), impl), impl, bounds)
    rows = drop_redundant_row(factor.double())
    row_scale = power_of_two(rows)
    rows, upper, tolerance = rows / row_scale, _is_upper(rows), norm_ops.value_tolerance(factor.dtype)
    values, reports = [], []
    for matrix in cov.reshape(-1, *cov.shape[-2:]):
        scale, (wide,) = scaled(matrix[None], impl)
        gram = triangular_sandwich(rows.mT, wide) if upper else rows @ wide @ rows.mT
        value, bound, accurate = norm_ops.root_sum(torch.linalg.eigvalsh(gram)[None], tolerance)
        if bool(accurate):
            if len(rows) < len(wide):  # a square factor's eigenvalues, all positive, have shown it
                checks.check_eigenvalues("cov", wide)
            scale = row_scale * scale.sqrt()
            value, report = value * scale, norm_ops.direct_report(value * scale, bound * scale, norm_ops.GRAM)
        else:
            value, report = _products(factor, *_root(symmetric_part(matrix.double()), impl), impl, bounds)
        values.append(value.reshape(-1))
        reports.append(report.reshape(-1))
    value, report = (torch.cat([rows.new_zeros(0), *parts]) for parts in (values, reports))
    return value.reshape(cov.shape[:-2]), report.reshape(*cov.shape[:-2], 4)


def _is_differentiated(*tensors: Tensor) -> bool:
    return is_differentiated(*tensors) or transform_is_active()


def _is_upper(matrix: Tensor) -> bool:
    """Return whether a matrix is known to be square and upper triangular."""
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return square and not watched() and not bool(values_of(matrix).tril(-1).any())


def _root(cov: Tensor, impl: str) -> tuple[Tensor, bool]:
    """R with R R^T = cov, and whether it is lower triangular, as a Cholesky factor is.

    A singular matrix has a factor of as many columns as its rank, or its symmetric root, which has a gradient. A
    compiled graph, which must serve any rank, takes the symmetric root; a CUDA graph takes Cholesky factors alone, NaN
    for a singular matrix.

    Raises:
        ValueError: the covariance is clearly indefinite.
    """
    if not torch.compiler.is_compiling():
        lower, singular = cholesky_if_definite(cov)
        if watched():
            return nan_unless(~singular, lower), True
        if not bool(values_of(singular).any()):
            return lower, True
        if cov.ndim == 2 and needs_no_dispatch(cov):
            return _singular_factor(cov, impl).mT, False
        checks.check_eigenvalues("cov", cov)
    return sqrtm_ops.call(cov, "auto", False, impl), False


def _products(factor: Tensor, other: Tensor, triangular: bool, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """``fastgan::nuclear_norm`` of F ``other``, F (..., n, d) and ``other`` (..., d, m), maybe lower triangular.

    Without gradients, a batch against one matrix goes in chunks that stay near the processor.
    """
    differentiable = _is_differentiated(factor, other)
    triangular = triangular and other.ndim == 2 and not differentiable

    def solve(factor: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        rows = drop_redundant_row(factor.double())
        if not triangular:
            return norm_ops.call(rows @ other, "auto", impl, bounds)
        flat = rows.reshape(-1, rows.shape[-1])
        product = torch.empty_like(flat)
        for j in range(0, flat.shape[-1], _BLOCK):  # leaving out most of the zeros of ``other``
            torch.mm(flat[:, j:], other[j:, j : j + _BLOCK], out=product[:, j : j + _BLOCK])
        return norm_ops.call(product.reshape(rows.shape), "auto", impl, bounds)

    if differentiable or watched() or (factor.ndim == 2) == (other.ndim == 2):
        return solve(factor, other)
    batch = factor if factor.ndim > 2 else other
    matrices = batch.reshape(-1, *batch.shape[-2:])
    chunks = matrices.split(max(1, _CHUNK_ENTRIES // batch.shape[-2:].numel()))
    parts = [solve(chunk, other) if batch is factor else solve(factor, chunk) for chunk in chunks]
    values, reports = zip(*parts, strict=True)
    return torch.cat(values).reshape(batch.shape[:-2]), torch.cat(reports).reshape(*batch.shape[:-2], 4)
