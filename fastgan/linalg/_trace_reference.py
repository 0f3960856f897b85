"""tr((A B)^{1/2}) for symmetric positive semi-definite A, B, in plain PyTorch.

With A = F F^T, the eigenvalues of the symmetric G = F^T B F are those of A B, so that tr((A B)^{1/2}) is the sum of the
square roots of the eigenvalues of G, and with B = H H^T the sum of the singular values of F^T H. A square root of an
eigenvalue at rounding level keeps half the digits only; singular values of the factors keep them all, at several times
the cost. Hence the order: Cholesky factor and eigenvalues of G with a bound on the error; where the bound is too wide,
singular values of the product of both Cholesky factors; where one of them is too near to singular, the same with
factors by pivoted Cholesky, which leave out what is at rounding level. The C++ operator is the same algorithm, step by
step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgan.linalg._nuclear_norm_reference import power_of_two, root_sum
from fastgan.linalg._pivoted_reference import ROUNDING, is_semidefinite, pivoted_cholesky
from fastgan.linalg._sqrtm_reference import symmetric_part

FAILED, CHOLESKY, PIVOTED, EIGH, SVD, AUTO, POLAR, JACOBI = -1, 0, 1, 2, 3, 4, 5, 6
DIRECT = {"auto": AUTO, "cholesky": CHOLESKY, "pivoted": PIVOTED, "eigh": EIGH, "svd": SVD}
"""The methods of :func:`trace_sqrt_product` here and of the C++ operator of that name."""

INDEFINITE = 1e-5
"""An eigenvalue below minus this share of the largest is no rounding error."""

_NOISE = 4 * torch.finfo(torch.float64).eps
_SANDWICH_COLUMNS, _SANDWICH_ROWS = 256, 512
_ASYMMETRY_BLOCK = 128


def asymmetry(a: Tensor) -> Tensor:
    """Largest magnitudes of A - A^T and of A for ``a`` (n, d, d), as (n, 2); not finite where an entry of A is not."""
    gaps = [
        (a[:, i : i + _ASYMMETRY_BLOCK, i:] - a[:, i:, i : i + _ASYMMETRY_BLOCK].mT).abs().amax((1, 2))
        for i in range(0, a.shape[-1], _ASYMMETRY_BLOCK)
    ]
    # amax carries NaN along, and an infinite entry makes its own difference infinite or NaN.
    return torch.stack([torch.stack(gaps, 1).amax(1), torch.maximum(a.amax((1, 2)), -a.amin((1, 2)))], 1).double()


def scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two (n,), and the symmetric float64 matrices (n, d, d) divided by them."""
    wide = matrices.double()
    scale = power_of_two(wide)
    return scale, symmetric_part(wide / scale[:, None, None])


def trace_sqrt_product(a: Tensor, b: Tensor, pairs: Tensor, method: int) -> Tensor:
    """Rows (value, error bound, method) for the index pairs (i, j) into ``a`` (na, d, d) and ``b`` (nb, d, d).

    Args:
        a, b: float32 or float64; computed in float64. Each matrix of ``a`` is factored once, however many pairs hold
            it.
        pairs: (n, 2) int64, on the host.
        method: one of :data:`DIRECT`'s values. The method in the result is :data:`FAILED`, and the value NaN, where a
            matrix is clearly indefinite, singular with ``method=CHOLESKY``, or indefinite beyond rounding with
            ``method=PIVOTED``.

    Returns:
        (n, 3) float64, on the host.
    """
    tolerance = 1e-7 if a.dtype == torch.float32 else 1e-9
    left, right = _Operand(a), _Operand(b)
    rows = []
    for i, j in pairs.tolist():
        value, bound, used = _solve(left, right, i, j, method, tolerance)
        # Two factors: the product of the scales may leave the range where the value does not.
        scale_a, scale_b = math.sqrt(left.scale(i)), math.sqrt(right.scale(j))
        rows.append((value * scale_a * scale_b, bound * scale_a * scale_b, used))
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


Row = tuple[float, float, int]
"""Value, error bound, method."""

_FAILED = (math.nan, math.inf, FAILED)

Quality = tuple[float, float]
"""Of a factor F with F F^T = A + E: |E|, and a lower bound of the smallest eigenvalue that F keeps."""


@dataclass(frozen=True)
class _Factor:
    """F with F F^T = A up to rounding, by rows: those of F^T, (r, d).

    With their columns in the given order, they are upper trapezoidal.
    """

    rows: Tensor
    order: Tensor | None
    quality: Quality
    method: int


class _Operand:
    """One operand: its matrices, scaled when first asked for, and each factored at most once."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices
        self._scaled: dict[int, tuple[Tensor, float]] = {}
        self._cholesky: dict[int, Tensor | None] = {}
        self._factors: dict[tuple[int, int], _Factor | None] = {}
        self._cholesky_quality: dict[int, Quality] = {}

    def matrix(self, i: int) -> Tensor:
        return self._entry(i)[0]

    def scale(self, i: int) -> float:
        return self._entry(i)[1]

    def _entry(self, i: int) -> tuple[Tensor, float]:
        if i not in self._scaled:
            scale, (matrix,) = scaled(self.matrices[i : i + 1])
            self._scaled[i] = matrix, scale.item()
        return self._scaled[i]

    def cholesky(self, i: int) -> Tensor | None:
        """Lower factor, or None where the matrix is not positive definite."""
        if i not in self._cholesky:
            self._cholesky[i] = _cholesky(self.matrix(i))
        return self._cholesky[i]

    def factor(self, i: int, method: int) -> _Factor | None:
        """The factor of a singular matrix that ``method`` takes, or None where there is none: by pivoted Cholesky,
        else, but for PIVOTED, by eigenvectors. Not for CHOLESKY."""
        if method != EIGH and not self.matrices.is_cuda:
            pivoted = self._cached(i, PIVOTED)
            if pivoted is not None or method == PIVOTED:
                return pivoted
        return None if method == PIVOTED else self._cached(i, EIGH)

    def _cached(self, i: int, method: int) -> _Factor | None:
        if (i, method) not in self._factors:
            self._factors[i, method] = self._pivoted_factor(i) if method == PIVOTED else self._eigen_factor(i)
        return self._factors[i, method]

    def _pivoted_factor(self, i: int) -> _Factor | None:
        """None where A is not semi-definite to rounding.

        Its quality is of the columns of the pivots, which make a square: the others can but add to the eigenvalues.
        """
        matrix = self.matrix(i)
        rows, order, remainder = pivoted_cholesky(matrix)
        if not is_semidefinite(matrix, remainder):
            return None
        lower = rows[:, order[: len(rows)]].mT
        return _Factor(rows, order, self._triangular_quality(lower, i), PIVOTED)

    def _eigen_factor(self, i: int) -> _Factor | None:
        """From the eigenvalues above rounding; None where A is clearly indefinite."""
        values, vectors = torch.linalg.eigh(self.matrix(i))
        smallest, largest = values[0].item(), values.abs().amax().item()
        if smallest < -INDEFINITE * largest:
            return None
        kept = values > values.numel() * ROUNDING * largest
        noise = _NOISE * torch.linalg.vector_norm(values).item()
        quality = noise, values[kept].amin().item() if kept.any() else math.inf
        return _Factor((vectors[:, kept] * values[kept].sqrt()).mT, None, quality, EIGH)

    def cholesky_quality(self, i: int) -> Quality:
        """Of the Cholesky factor, which must be there."""
        if i not in self._cholesky_quality:
            lower = self._cholesky[i]
            assert lower is not None
            self._cholesky_quality[i] = self._triangular_quality(lower, i)
        return self._cholesky_quality[i]

    def _triangular_quality(self, lower: Tensor, i: int) -> Quality:
        """Of a factor of A that is lower triangular in some rows: the smallest eigenvalue is at least 1 / |L^-1|^2."""
        if len(lower) == 0:
            return _NOISE * self.trace(i), math.inf
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
        return _NOISE * self.trace(i), 1 / inverse.square().sum().item()

    def trace(self, i: int) -> float:
        return max(self.matrix(i).diagonal().sum().item(), 0.0)

    def factor_error(self, i: int, quality: Quality, value: float, other: _Operand, j: int) -> float:
        """How far from tr((A B)^{1/2}) a factor of this quality may take ``value``.

        F F^T = A + E with |E| at rounding level, which moves F by at most |E| / lambda^{1/2}, lambda the smallest
        eigenvalue kept, and the sum of the singular values of F^T H by |H| times that; or, to first order, the value by
        <E, P> / 2, where the trace of P is at most the value over lambda. The product F^T H adds its own rounding.
        """
        noise, smallest = quality
        own_trace, trace = self.trace(i), other.trace(j)
        product_error = _NOISE * math.sqrt(own_trace * trace)
        return noise * min(0.5 * value / smallest, math.sqrt(trace / smallest)) + product_error

    def semidefinite(self, i: int) -> bool:
        """False where A has an eigenvalue clearly below zero, by one Cholesky factorisation of A + tolerance I."""
        matrix = self.matrix(i).clone()
        matrix.diagonal().add_(INDEFINITE)
        return _cholesky(matrix) is not None


def _cholesky(matrix: Tensor) -> Tensor | None:
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower if info.item() == 0 else None


def _solve(a: _Operand, b: _Operand, i: int, j: int, method: int, tolerance: float) -> Row:
    found = None
    lower = a.cholesky(i) if method in (AUTO, CHOLESKY) else None
    if lower is not None:
        product = triangular_sandwich(lower, b.matrix(j))
        value, bound, accurate = _from_gram_eigenvalues(torch.linalg.eigvalsh(product), tolerance)
        if accurate:
            return value, bound, CHOLESKY
        if method == CHOLESKY:
            return (value, bound, CHOLESKY) if b.semidefinite(j) else _FAILED
        found = _from_cholesky_factors(a, b, i, j, value, tolerance)
        if found is None:  # it is B that may be singular
            found = _from_one_factor(b, a, j, i, method, tolerance)
    elif method == CHOLESKY:
        return _FAILED
    elif method != SVD:
        found = _from_factor_of_lower_rank(a, b, i, j, method, tolerance)
    return found or _from_both_factors(a, b, i, j, method)


def _from_one_factor(x: _Operand, y: _Operand, i: int, j: int, method: int, tolerance: float) -> Row | None:
    """By eigenvalues of F^T Y F with a factor of X = F F^T, or None where their error bound is too wide."""
    factor = x.factor(i, method)
    if factor is None or not y.semidefinite(j):
        return _FAILED
    if len(factor.rows) == 0:
        return 0.0, 0.0, factor.method
    value, bound, accurate = _from_gram_eigenvalues(torch.linalg.eigvalsh(_gram(factor, y.matrix(j))), tolerance)
    return (value, bound + x.factor_error(i, factor.quality, value, y, j), factor.method) if accurate else None


def _gram(factor: _Factor, y: Tensor) -> Tensor:
    if factor.order is None:
        return factor.rows @ y @ factor.rows.mT
    return triangular_sandwich(factor.rows[:, factor.order].mT, y[factor.order][:, factor.order])


def _from_factor_of_lower_rank(a: _Operand, b: _Operand, i: int, j: int, method: int, tolerance: float) -> Row | None:
    """F^T Y F of a factor that has more columns than Y has rank is singular: its eigenvalues are not accurate."""
    found = _from_one_factor(a, b, i, j, method, tolerance)
    if found is not None:
        return found
    factor, other = a.factor(i, method), b.factor(j, method)
    if factor is None or other is None or len(other.rows) >= len(factor.rows):
        return None
    return _from_one_factor(b, a, j, i, method, tolerance)


def _from_both_factors(a: _Operand, b: _Operand, i: int, j: int, method: int) -> Row:
    factor, other = a.factor(i, method), b.factor(j, method)
    if factor is None or other is None:
        return _FAILED
    if 0 in (len(factor.rows), len(other.rows)):
        return 0.0, 0.0, factor.method
    value, bound = _from_singular_values(factor.rows @ other.rows.mT)
    factor_errors = a.factor_error(i, factor.quality, value, b, j) + b.factor_error(j, other.quality, value, a, i)
    return value, bound + factor_errors, SVD


def _from_cholesky_factors(a: _Operand, b: _Operand, i: int, j: int, value: float, tolerance: float) -> Row | None:
    """By singular values of the product of both Cholesky factors, or None where these are not accurate enough to give
    ``value``, which is about the result."""
    left, right = a.cholesky(i), b.cholesky(j)
    if left is None or right is None:
        return None
    error = a.factor_error(i, a.cholesky_quality(i), value, b, j) + b.factor_error(
        j, b.cholesky_quality(j), value, a, i
    )
    if not error <= 0.5 * tolerance * value:
        return None
    found, bound = _from_singular_values(left.mT @ right)
    return found, bound + error, SVD


def _from_singular_values(product: Tensor) -> tuple[float, float]:
    singular = torch.linalg.svdvals(product)
    noise = _NOISE * torch.linalg.vector_norm(singular).item()
    return singular.sum().item(), noise * math.sqrt(singular.numel())


def triangular_sandwich(lower: Tensor, b: Tensor) -> Tensor:
    """Lower triangle of L^T B L, L (d, r) lower trapezoidal.

    Column block J needs B and L from J on only, and of its row block I needs L from I on: a quarter of the operations
    of two full products.
    """
    rank = lower.shape[1]
    out = b.new_zeros(rank, rank)
    for j in range(0, rank, _SANDWICH_COLUMNS):
        panel = b[j:, j:] @ lower[j:, j : j + _SANDWICH_COLUMNS]
        for i in range(j, rank, _SANDWICH_ROWS):
            rows = lower[i:, i : i + _SANDWICH_ROWS].mT @ panel[i - j :]
            out[i : i + _SANDWICH_ROWS, j : j + _SANDWICH_COLUMNS] = rows
    return out


def _from_gram_eigenvalues(eigenvalues: Tensor, tolerance: float) -> tuple[float, float, bool]:
    value, bound, accurate = root_sum(eigenvalues, tolerance)
    return value.item(), bound.item(), bool(accurate)


def cholesky_if_definite(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors, and where they fail or have a pivot at rounding level, which is noise and not a direction.

    A higher level than of pivoted ones: without a choice of pivots, small ones make rounding errors grow.
    """
    lower, failed = torch.linalg.cholesky_ex(matrices)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1)
    return lower, (failed != 0) | ~(pivots > 16 * matrices.shape[-1] * ROUNDING * largest)


def factors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d, d) factors F with A = F F^T, and whether A is clearly indefinite, (n,), for scaled symmetric matrices.

    Cholesky factors, and where there is none the eigenvectors of the eigenvalues above rounding. Within a CUDA graph,
    where nobody may look, Cholesky factors alone.
    """
    lower, singular = cholesky_if_definite(matrices)
    indefinite = torch.zeros(len(matrices), dtype=torch.bool, device=matrices.device)
    if matrices.is_cuda and torch.cuda.is_current_stream_capturing():
        return lower, indefinite
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(matrices[singular])
        largest = values.abs().amax(-1, keepdim=True)
        floor = values.shape[-1] * ROUNDING * largest
        lower[singular] = vectors * torch.where(values > floor, values, 0.0).sqrt()[:, None, :]
        indefinite[singular] = values[:, 0] < -INDEFINITE * largest[:, 0]
    return lower, indefinite


def factor_noise(factor: Tensor) -> Tensor:
    """For factors (n, d, d) of :func:`factors`: (rounding level, smallest eigenvalue or a bound of it, trace)."""
    trace = factor.square().sum((1, 2))
    noise = _NOISE * torch.linalg.matrix_norm(factor @ factor.mT)
    columns = factor.square().sum(1)
    by_eigenvectors = torch.where(columns > 0, columns, torch.inf).amin(-1)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    by_cholesky = inverse.square().sum((1, 2)).reciprocal()
    triangular = (factor.triu(1) == 0).all(-1).all(-1) & (factor.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    return torch.stack([noise, torch.where(triangular, by_cholesky, by_eigenvectors), trace], 1)


def factor_errors(value: Tensor, noise_a: Tensor, noise_b: Tensor) -> Tensor:
    """Both operands' :meth:`_Operand.factor_error` of ``value`` (n,), from their :func:`factor_noise`."""
    total = 2 * _NOISE * (noise_a[:, 2] * noise_b[:, 2]).sqrt()
    for own, other in ((noise_a, noise_b), (noise_b, noise_a)):
        noise, smallest, trace = own[:, 0], own[:, 1], other[:, 2]
        total = total + noise * torch.minimum(0.5 * value / smallest, (trace / smallest).sqrt())
    return total
