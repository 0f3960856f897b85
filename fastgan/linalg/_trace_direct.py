"""tr((A B)^{1/2}) pair by pair, from a factor of A or B and an eigensolver.

With A = F F^T, the eigenvalues of the symmetric G = F^T B F are those of A B, so that tr((A B)^{1/2}) is the sum of the
square roots of the eigenvalues of G, and with B = H H^T the sum of the singular values of F^T H. The square root of an
eigenvalue at rounding level keeps only half the digits. Singular values of the factors keep them all, at several times
the cost. Hence the order: Cholesky factor and eigenvalues of G, with a bound on the error; if the bound is too wide,
singular values of the product of both Cholesky factors; if one of them is too close to singular, the same with factors
by pivoted Cholesky, which leave out directions at rounding level.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fastgan.linalg._nuclear_norm import root_sum, singular_sum, value_tolerance
from fastgan.linalg._pivoted import semidefinite_rows
from fastgan.linalg._symmetric import INDEFINITE, ROUNDING, eigen_factor, scaled, triangular_sandwich

METHODS = ("auto", "cholesky", "pivoted", "eigh", "svd", "polar", "jacobi")
BY_COST = METHODS[1:]
"""The methods by their code in a report; the costlier come later."""

FAILED = -1
"""The code of a pair without a value."""

Row = tuple[float, float, int]
"""Value, error bound and code of the method."""

_FAILED = (math.nan, math.inf, FAILED)


def trace_sqrt_products(a: Tensor, b: Tensor, pairs: Tensor, method: str, impl: str) -> Tensor:
    """Rows (value, error bound, code of the method) for the index pairs (i, j) into ``a`` and ``b``.

    Args:
        a, b: (., d, d), float32 or float64; computed in float64. Each matrix is scaled, and factored, at most once.
        pairs: (n, 2) int64, on the host.
        method: "auto", "cholesky", "pivoted", "eigh" or "svd".
        impl: resolved.

    Returns:
        (n, 3) float64, on the host. The value is NaN and the code :data:`FAILED` if a matrix is clearly indefinite,
        singular with "cholesky", or indefinite beyond rounding with "pivoted".
    """
    left_pairs, right_pairs = (Counter(side) for side in pairs.T.tolist())
    left: dict[int, _Matrix] = {}
    right: dict[int, _Matrix] = {}
    rows = []
    for i, j in pairs.tolist():
        x, y = left.pop(i, None) or _Matrix(a[i], impl), right.pop(j, None) or _Matrix(b[j], impl)
        left_pairs[i] -= 1
        right_pairs[j] -= 1
        if left_pairs[i]:  # kept while pairs to come hold it
            left[i] = x
        if right_pairs[j]:
            right[j] = y
        value, bound, code = _solve(x, y, method, value_tolerance(a.dtype))
        # Two factors, since the product of the scales may overflow or underflow when the value does not.
        scale_x, scale_y = math.sqrt(x.scale), math.sqrt(y.scale)
        rows.append((value * scale_x * scale_y, bound * scale_x * scale_y, code))
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


class _Matrix:
    """One matrix divided by a power of two, and its factors, each of them computed when first asked for."""

    def __init__(self, matrix: Tensor, impl: str) -> None:
        scale, entries = scaled(matrix[None], impl)
        self.scale, self.entries = scale.item(), entries[0]
        self.impl = impl

    @cached_property
    def trace(self) -> Tensor:
        return self.entries.diagonal().sum().clamp(min=0)

    @cached_property
    def semidefinite(self) -> bool:
        """True if no eigenvalue is clearly below zero, by one Cholesky factorization of A + tolerance I."""
        shifted = self.entries.clone()
        shifted.diagonal().add_(INDEFINITE)
        return torch.linalg.cholesky_ex(shifted)[1].item() == 0

    @cached_property
    def cholesky(self) -> _Factor | None:
        """The Cholesky factor, or None if the matrix is not positive definite."""
        lower, info = torch.linalg.cholesky_ex(self.entries)
        return _Factor(lower.mT, "cholesky") if info.item() == 0 else None

    @cached_property
    def pivoted(self) -> _Factor | None:
        """The pivoted Cholesky factor, or None if the matrix is not semi-definite up to rounding.

        Always None on a GPU, which would wait for each pivot.
        """
        found = None if self.entries.is_cuda else semidefinite_rows(self.entries, self.impl)
        return found and _Factor(found[0], "pivoted", order=found[1])

    @cached_property
    def eigen(self) -> _Factor | None:
        """From the eigenvalues above rounding; None if one is clearly below zero."""
        columns, values, kept = eigen_factor(self.entries)
        if values[0].item() < -INDEFINITE * values.abs().amax().item():
            return None
        rows = columns[:, len(values) - int(kept.sum()) :].mT
        return _Factor(rows, "eigh", noise=ROUNDING * torch.linalg.vector_norm(values))

    def factor(self, method: str) -> _Factor | None:
        """The factor of a singular matrix: pivoted, except for "eigh", else by eigenvectors, except for "pivoted"."""
        found = None if method == "eigh" else self.pivoted
        return self.eigen if found is None and method != "pivoted" else found

    def error(self, factor: _Factor, value: Tensor, other: _Matrix) -> Tensor:
        noise = ROUNDING * self.trace if factor.noise is None else factor.noise
        return factor_error(value, (noise, factor.smallest, self.trace), other.trace)


class _Factor:
    """F with F F^T = A up to rounding, as the rows of F^T, (r, d).

    Attributes:
        order: of the pivots. With its columns in that order ``rows`` is upper trapezoidal, as a Cholesky factor's are.
        noise: |E| for F F^T = A + E, if it is not that of a Cholesky factor.
    """

    def __init__(self, rows: Tensor, method: str, order: Tensor | None = None, noise: Tensor | None = None) -> None:
        self.rows, self.method, self.order, self.noise = rows, method, order, noise

    @cached_property
    def smallest(self) -> Tensor:
        """A lower bound of the smallest eigenvalue that F keeps.

        It is 1 / |L^-1|^2 for a triangular factor L. A trapezoidal one has a square in the columns of its pivots; the
        others can only add to the eigenvalues.
        """
        rank = len(self.rows)
        if rank == 0:
            return self.rows.new_tensor(math.inf)
        if self.method == "eigh":
            return self.rows.square().sum(1).amin()
        upper = self.rows if self.order is None else _columns(self.rows, self.order[:rank])
        eye = torch.eye(rank, dtype=upper.dtype, device=upper.device)
        return torch.linalg.vector_norm(torch.linalg.solve_triangular(upper.mT, eye, upper=False)) ** -2

    def gram(self, y: Tensor) -> Tensor:
        """F^T Y F; only the lower triangle is read."""
        if self.method == "eigh":
            return self.rows @ y @ self.rows.mT
        if self.order is None:
            return triangular_sandwich(self.rows.mT, y)
        return triangular_sandwich(_columns(self.rows, self.order).mT, _columns(y[self.order], self.order))


def _columns(matrix: Tensor, index: Tensor) -> Tensor:
    """``matrix[:, index]``, twice as fast on a CPU."""
    return matrix.gather(1, index.expand(len(matrix), len(index)))


def factor_error(value: Tensor, own: Sequence[Tensor], other_trace: Tensor) -> Tensor:
    """Bound of the error that a factor F of A adds to ``value``, about tr((A B)^{1/2}).

    ``own`` is |E|, a lower bound of the smallest eigenvalue that F keeps, and the trace of A; ``other_trace`` is B's.
    F F^T = A + E with |E| at rounding level. That moves F by at most |E| / lambda^{1/2}, lambda the smallest eigenvalue
    kept, and the sum of the singular values of F^T H by |H| times that. To first order it moves the value by
    <E, P> / 2, and the trace of P is at most the value over lambda. The product F^T H adds its own rounding.
    """
    noise, smallest, trace = own
    moved = noise * torch.minimum(0.5 * value / smallest, (other_trace / smallest).sqrt())
    return moved + ROUNDING * (trace * other_trace).sqrt()


def _solve(x: _Matrix, y: _Matrix, method: str, tolerance: float) -> Row:
    lower = x.cholesky if method in ("auto", "cholesky") else None
    if lower is not None:
        value, bound, accurate = root_sum(torch.linalg.eigvalsh(lower.gram(y.entries)), tolerance)
        if bool(accurate) or (method == "cholesky" and y.semidefinite):
            return _row(value, bound, "cholesky")
        if method == "auto" and y.cholesky is not None:
            error = x.error(lower, value, y) + y.error(y.cholesky, value, x)
            if bool(error <= 0.5 * tolerance * value):
                return _from_both(x, lower, y, y.cholesky)
    if method == "cholesky":
        return _FAILED
    # F^T Y F of a factor with more columns than Y has rank is singular: its eigenvalues are not accurate.
    rank: float = math.inf
    for one, other in [] if method == "svd" else [(y, x)] if lower is not None else [(x, y), (y, x)]:
        factor = one.factor(method)
        if factor is not None and len(factor.rows) >= rank:
            break
        if factor is None or not other.semidefinite:
            return _FAILED
        rank = len(factor.rows)
        if rank == 0:
            return 0.0, 0.0, BY_COST.index(factor.method)
        value, bound, accurate = root_sum(torch.linalg.eigvalsh(factor.gram(other.entries)), tolerance)
        if bool(accurate):
            return _row(value, bound + one.error(factor, value, other), factor.method)
    factor_x, factor_y = x.factor(method), y.factor(method)
    return _FAILED if factor_x is None or factor_y is None else _from_both(x, factor_x, y, factor_y)


def _from_both(x: _Matrix, f: _Factor, y: _Matrix, g: _Factor) -> Row:
    """Compute the trace as the sum of the singular values of F^T G."""
    if 0 in (len(f.rows), len(g.rows)):
        return 0.0, 0.0, BY_COST.index(f.method)
    value, bound = singular_sum(f.rows @ g.rows.mT)
    return _row(value, bound + x.error(f, value, y) + y.error(g, value, x), "svd")


def _row(value: Tensor, bound: Tensor, method: str) -> Row:
    return value.item(), bound.item(), BY_COST.index(method)
