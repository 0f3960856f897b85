"""``fastgan::trace_sqrt_product``: the choice between pair by pair, one batch, the polar iteration and Jacobi's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan.linalg._checks import batch_shape
from fastgan.linalg._dispatch import register_derivatives, resolve, watched
from fastgan.linalg._nuclear_norm import (
    LOWER,
    METHOD,
    UPPER,
    direct_report,
    polar_rows,
    root_sum,
    value_tolerance,
)
from fastgan.linalg._symmetric import INDEFINITE, ROUNDING, cholesky_if_definite, eigen_factor, scaled
from fastgan.linalg._trace_direct import BY_COST, FAILED, factor_error, trace_sqrt_products
from fastgan.linalg._trace_gradients import trace_sqrt_product_bwd, trace_sqrt_product_bwd_bwd

JACOBI_SIZE = 64
"""Largest d of the kernel that takes a pair of matrices a block: three of them stand in its shared memory."""

BATCH_SIZE, BATCH_PAIRS = 128, 2
"""On a CPU, at least this many pairs of matrices of up to this size are worked on as a batch: a call for each costs
more than the arithmetic."""

DEFINITE_SIZE = 256
"""Largest d for the extension's method for definite matrices on a CPU: its working memory then fits a core's caches."""

_CHUNK_ENTRIES = 2**26  # of the products that a chunk of pairs is iterated on


def compute(a: Tensor, b: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """tr((A B)^{1/2}) of (..., d, d) matrices, and float64 (lower bound, upper bound, method code, iterations)."""
    shape, impl = batch_shape(a, b), resolve(impl, a.device)
    if is_small(a, method, impl):
        found = definite(a, b)
        if found is not None:
            return found
    matrices_a, matrices_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    if method == "auto" and a.is_cuda:
        method = "jacobi" if a.shape[-1] <= JACOBI_SIZE and impl == "extension" else "polar"
    # made on the device that uses them: within a CUDA graph nothing may be copied to the device
    device = a.device if method in ("polar", "jacobi") else torch.device("cpu")
    pairs = torch.stack([_indices(operand, shape, device) for operand in (a, b)], 1)
    if len(matrices_b) < len(matrices_a):  # the first operand is factored: let that be the one with fewer matrices
        matrices_a, matrices_b, pairs = matrices_b, matrices_a, pairs.flip(1)
    value, report = _solve(matrices_a, matrices_b, pairs, method, impl, bounds)
    return value.to(a.dtype, copy=True).reshape(shape), report.reshape(*shape, 4)


def is_small(a: Tensor, method: str, impl: str) -> bool:
    """Return whether :func:`definite` may be tried, which looks at the entries itself."""
    return impl == "extension" and a.shape[-1] <= DEFINITE_SIZE and method in ("auto", "cholesky") and not a.is_cuda


def definite(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """:func:`compute`'s result by one call of the extension (csrc/definite_trace.h), or None if that does not serve.

    It serves definite matrices, each with another or all with one, whose error bounds are small enough.
    """
    shape = batch_shape(a, b)
    if b.numel() < a.numel():
        a, b = b, a
    if b.shape[:-2] != shape or (a.shape[:-2] != shape and a.shape[:-2].numel() != 1):
        return None
    value, report, found = torch.ops.fastgan_C.definite_trace(a, b, shape, value_tolerance(a.dtype))
    return (value, report) if found else None


trace_sqrt_product = custom_op("fastgan::trace_sqrt_product", mutates_args=())(compute)
call = register_derivatives(trace_sqrt_product, trace_sqrt_product_bwd, trace_sqrt_product_bwd_bwd, operands=2)


@trace_sqrt_product.register_fake
def _(a: Tensor, b: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    shape = batch_shape(a, b)
    return a.new_empty(shape), a.new_empty((*shape, 4), dtype=torch.float64)


def _indices(operand: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Return, for each pair of the broadcast batch, the index of its matrix in ``operand``."""
    batch = operand.shape[:-2]
    every = torch.arange(batch.numel(), device=device)
    return every if batch == shape else every.reshape(batch).expand(shape).reshape(-1)


def _solve(a: Tensor, b: Tensor, pairs: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """Values (n,) and reports (n, 4) for pairs of matrices of a and b, (., d, d)."""
    if len(pairs) == 0:
        return a.new_zeros(0, dtype=torch.float64), a.new_zeros(0, 4, dtype=torch.float64)
    if method == "polar":
        return _polar(a, b, pairs, impl, bounds)
    if method == "jacobi":
        value, bound, semidefinite = torch.ops.fastgan_C.small_trace(a, b, pairs).unbind(1)
        codes = torch.where(semidefinite > 0, BY_COST.index("jacobi"), FAILED)
    elif method == "auto" and a.shape[-1] <= BATCH_SIZE and len(pairs) >= BATCH_PAIRS:
        value, bound, codes = _batched(a, b, pairs, impl).unbind(1)
    else:
        value, bound, codes = trace_sqrt_products(a, b, pairs, method, impl).to(a.device).unbind(1)
    return value, direct_report(value, bound, codes)


def _batched(a: Tensor, b: Tensor, pairs: Tensor, impl: str) -> Tensor:
    """Return the rows of :func:`trace_sqrt_products`, by one batched Cholesky factorization if that will do."""
    (scale_a, wide_a), (scale_b, wide_b) = scaled(a, impl), scaled(b, impl)
    lower, singular = cholesky_if_definite(wide_a)
    i, j = pairs.unbind(1)
    factor = _taken(lower, i)
    eigenvalues = torch.linalg.eigvalsh(factor.mT @ _taken(wide_b, j) @ factor)
    value, bound, accurate = root_sum(eigenvalues, value_tolerance(a.dtype))
    scale = scale_a[i].sqrt() * scale_b[j].sqrt()
    rows = torch.stack([value * scale, bound * scale, torch.full_like(value, BY_COST.index("cholesky"))], 1)
    rest = singular[i] | ~accurate
    if bool(rest.any()):
        rows[rest] = trace_sqrt_products(a, b, pairs[rest], "auto", impl)
    return rows


def _taken(matrices: Tensor, index: Tensor) -> Tensor:
    """``matrices[index]``, without a copy if that is all of them in their order."""
    every = torch.arange(len(matrices), device=index.device)
    return matrices if torch.equal(index, every) else matrices[index]


def _polar(a: Tensor, b: Tensor, pairs: Tensor, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """||F^T H||_* of factors A = F F^T, B = H H^T, each taken once."""
    scale_a, factor_a, indefinite_a, noise_a = _factored(a, impl, bounds)
    scale_b, factor_b, indefinite_b, noise_b = _factored(b, impl, bounds)
    step = max(1, _CHUNK_ENTRIES // a.shape[-1] ** 2)
    values, reports = [], []
    for i, j in (chunk.unbind(1) for chunk in pairs.split(step)):
        value, report = polar_rows(factor_a[i].mT @ factor_b[j], a.dtype, impl, bounds)
        if noise_a is not None and noise_b is not None:
            own_a, own_b = noise_a[:, i].unbind(), noise_b[:, j].unbind()
            error = factor_error(value, own_a, own_b[2]) + factor_error(value, own_b, own_a[2])
            report[:, LOWER], report[:, UPPER] = (report[:, LOWER] - error).clamp(min=0), report[:, UPPER] + error
        scale = scale_a[i].sqrt() * scale_b[j].sqrt()
        report[:, :METHOD] *= scale[:, None]
        bad = indefinite_a[i] | indefinite_b[j]
        report[:, METHOD] = torch.where(bad, FAILED, BY_COST.index("polar"))
        values.append(torch.where(bad, float("nan"), value * scale))
        reports.append(report)
    return torch.cat(values), torch.cat(reports)


def _factored(matrices: Tensor, impl: str, bounds: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scales (n,), factors F (n, d, d) with A = F F^T, whether A is clearly indefinite (n,), and F's noise (3, n).

    These are Cholesky factors, or for singular matrices the eigenvectors of eigenvalues above rounding. Values cannot
    be read within a CUDA graph: there they are Cholesky factors only, and a singular matrix counts as indefinite.
    """
    scale, wide = scaled(matrices, impl)
    factor, singular = cholesky_if_definite(wide)
    indefinite = singular.clone() if watched() else torch.zeros_like(singular)
    if not watched() and bool(singular.any()):
        factor[singular], values, _ = eigen_factor(wide[singular])
        indefinite[singular] = values[:, 0] < -INDEFINITE * values.abs().amax(-1)
    if not bounds:
        return scale, factor, indefinite, None
    columns = factor.square().sum(1)
    by_eigenvectors = torch.where(columns > 0, columns, torch.inf).amin(-1)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    by_cholesky = torch.linalg.solve_triangular(factor, eye, upper=False).square().sum((1, 2)).reciprocal()
    smallest = torch.where(singular, by_eigenvectors, by_cholesky)
    noise = torch.stack([ROUNDING * torch.linalg.matrix_norm(wide), smallest, factor.square().sum((1, 2))])
    return scale, factor, indefinite, noise
