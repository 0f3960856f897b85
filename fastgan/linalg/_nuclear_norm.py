"""``fastgan::nuclear_norm``: ||M||_*, the sum of the singular values, its polar factor and first two derivatives.

Any U with ||U||_2 <= 1 gives <U, M> <= ||M||_*, with equality at the polar factor. The value is stationary there, so an
error e in U costs O(e^2). :func:`polar_factor` finds U from matrix products alone. Internal functions take batches
(n, rows, cols) of float64 matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan.linalg._dispatch import by_products, nan_unless, register_derivatives, resolve, watched
from fastgan.linalg._sqrtm import NEWTON_SCHULZ, lyapunov_newton_schulz, scaled_newton_schulz
from fastgan.linalg._symmetric import ROUNDING, power_of_two, symmetric_part

METHODS = ("auto", "svd", "gram", "polar")
BY_COST = ("gram", "svd", "polar")
GRAM, SVD, POLAR = range(3)
"""Codes of the methods in a report; the costlier come later."""

LOWER, UPPER, METHOD, ITERATIONS = range(4)
"""Columns of a report."""

_SMALL, _LARGE = 2.0**-100, 2.0**100
"""Between them the fourth power of an entry, the largest that anything here takes, stays in float64's range."""

_PASSES = 2
_SMALLEST = 1e-7
_ORTHONORMAL = 1e-7


def compute(m: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """||M||_* of (..., rows, cols) matrices, and float64 (lower bound, upper bound, method code, iterations)."""
    flat = m.reshape(-1, *m.shape[-2:])
    flat = (flat if m.shape[-2] <= m.shape[-1] else flat.mT).double()
    scale = power_of_two(flat)
    if m.is_cuda or bool(((scale < _SMALL) | (scale > _LARGE)).any()):  # a whole pass over memory, on a CPU
        flat = flat / scale[:, None, None]
    else:
        scale = torch.ones_like(scale)
    value, report = _solve(flat, m.dtype, method, impl, bounds)
    report[:, :METHOD] *= scale[:, None]
    return (value * scale).to(m.dtype, copy=True).reshape(m.shape[:-2]), report.reshape(*m.shape[:-2], 4)


nuclear_norm = custom_op("fastgan::nuclear_norm", mutates_args=())(compute)


@nuclear_norm.register_fake
def _(m: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    return m.new_empty(m.shape[:-2]), m.new_empty((*m.shape[:-2], 4), dtype=torch.float64)


def _solve(m: Tensor, dtype: torch.dtype, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    if len(m) == 0:
        return m.new_zeros(0), m.new_zeros(0, 4)
    if method == "polar" or (method == "auto" and m.is_cuda):
        return polar_rows(m, dtype, impl, bounds)
    if method == "svd":
        value, bound = singular_sum(m)
        return value, direct_report(value, bound, SVD)
    value, bound, accurate = root_sum(torch.linalg.eigvalsh(m @ m.mT), value_tolerance(dtype))
    report = direct_report(value, bound, GRAM)
    if method == "auto" and not bool(accurate.all()):
        value[~accurate], bound = singular_sum(m[~accurate])
        report[~accurate] = direct_report(value[~accurate], bound, SVD)
    return value, report


def value_tolerance(dtype: torch.dtype) -> float:
    """The share of the value that an error bound may have before a slower method takes over."""
    return 1e-7 if dtype == torch.float32 else 1e-9


def direct_report(value: Tensor, bound: Tensor, method: Tensor | int) -> Tensor:
    """Reports (n, 4) of a method without iterations."""
    none = torch.zeros_like(value)
    return torch.stack([(value - bound).clamp(min=0), value + bound, none + method, none], 1)


def singular_sum(m: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the singular values of ``m`` (..., rows, cols), and bounds on their errors."""
    singular = torch.linalg.svdvals(m)
    return singular.sum(-1), ROUNDING * math.sqrt(singular.shape[-1]) * torch.linalg.vector_norm(singular, dim=-1)


def root_sum(eigenvalues: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the last dimension of the square roots of ``eigenvalues``, which are in ascending order, a bound on its
    error, and whether that is within ``tolerance`` of the sum and no eigenvalue is clearly negative.

    For eigenvalues above |E|, the eigensolver's error E changes the sum by <E, G^{-1/2}> / 2, by Cauchy-Schwarz at most
    |E| |G^{-1/2}| / 2 in Frobenius norms. Each smaller eigenvalue changes it by at most sqrt(|E|).
    """
    noise = ROUNDING * torch.linalg.vector_norm(eigenvalues, dim=-1)
    roots = eigenvalues.clamp(min=0).sqrt()
    value = roots.sum(-1)
    lost = eigenvalues <= 4 * noise[..., None]
    bound = 0.5 * noise * torch.linalg.vector_norm(roots.reciprocal().masked_fill(lost, 0), dim=-1)
    if bool(lost.any()):
        bound = bound + (noise[..., None] + roots.square()).sqrt().masked_fill(~lost, 0).sum(-1)
    return value, bound, (eigenvalues[..., 0] >= -noise) & (bound <= tolerance * value)


def polar_rows(m: Tensor, dtype: torch.dtype, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """Values (n,) and reports (n, 4) of ``m``, rows <= cols, entries about 1 in size, by the polar iteration.

    ``dtype`` is that of the operands behind ``m``: for float32 ones, float32 iterations come first.
    """
    low = dtype == torch.float32
    u, found = polar_factor(m, low, 1e-5 if low else 1e-10, impl)
    value = found[:, 0]
    lower, upper = polar_bounds(m, u) if bounds else (torch.zeros_like(value), value + float("inf"))
    return value, torch.stack([lower, upper, torch.full_like(value, POLAR), found[:, 2]], 1)


def polar_factor(m: Tensor, low_precision: bool, tolerance: float, impl: str) -> tuple[Tensor, Tensor]:
    """Polar factors (n, rows, cols), and (n, 3): value, error estimate, iterations.

    On a GPU the extension takes the same steps (csrc/nuclear_norm.h).

    Args:
        m: rows <= cols, entries of about 1 or below.
        low_precision: float32 iterations first, polished in float64; float64 ones follow if that was not enough.
        tolerance: a matrix whose error estimate is below this share of its value is done.
    """
    if m.is_cuda and resolve(impl, m.device) == "extension":
        return torch.ops.fastgan_C.nuclear_norm(m.contiguous(), low_precision, tolerance)
    gram = m @ m.mT
    scale = gram.square().sum((1, 2)).sqrt().sqrt()[:, None, None] * (1 + 1e-12)
    start = torch.where(scale > 0, m / scale, 0.0)
    full = scaled_newton_schulz(_SMALLEST)
    x, iterations = torch.zeros_like(m), m.new_zeros(len(m))
    done = torch.zeros(len(m), dtype=torch.bool, device=m.device)
    value, error = m.new_zeros(len(m)), m.new_zeros(len(m))
    passes = [(start, full)] + [(None, full)] * (_PASSES - 1)
    if low_precision:
        iterations += len(full)
        passes.insert(0, (_iterate(start.float(), full).double(), [NEWTON_SCHULZ] * 2))
    for begin, steps in passes:
        iterations = torch.where(done, iterations, iterations + len(steps))
        x = torch.where(done[:, None, None], x, _iterate(x if begin is None else begin, steps))
        value, error = _measure(m, x)
        done = done | (error <= tolerance * value)
        if done.all():
            break
    return x, torch.stack([value, error, iterations], 1)


def _iterate(x: Tensor, steps: list[tuple[float, float]]) -> Tensor:
    gram, results = x.new_empty(x.shape[0], x.shape[1], x.shape[1]), (torch.empty_like(x), torch.empty_like(x))
    for k, (linear, cubic) in enumerate(steps):
        torch.bmm(x, x.mT, out=gram)
        x = torch.baddbmm(x, gram, x, beta=linear, alpha=-cubic, out=results[k % 2])
    return x


def _measure(m: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """<U, M>, and sqrt(rows) (|K| + |R|) with H = M U^T, K its skew part and R = M - H U."""
    h = m @ u.mT
    residual, skew = _norm(m - h @ u), _norm(0.5 * (h - h.mT))
    return (m * u).sum((1, 2)), math.sqrt(m.shape[1]) * (residual + skew)


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1))


def polar_bounds(m: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds (n,) of ||M||_* from any approximate polar factor U.

    Lower: <U, M> / ||U||_2. Each eigenvalue g of G = U U^T obeys |g^2 - g| <= |G^2 - G|_F, so g is at most 1 plus that.
    Upper: (tr(W) tr(M^T W^{-1} M))^{1/2} for any positive definite W, least at W = (M M^T)^{1/2}. Here W is the
    symmetric part of M U^T, shifted by its known error.
    """
    value, h, gram = (m * u).sum((1, 2)), m @ u.mT, u @ u.mT
    rows, size = m.shape[1], _norm(m)
    lower = value / (1 + _norm(gram @ gram - gram)).sqrt()
    wrong = _norm(0.5 * (h - h.mT)) + _norm(m - h @ u) + 2 * ROUNDING * _norm(h)
    w = symmetric_part(h) + wrong[:, None, None] * torch.eye(rows, dtype=m.dtype, device=m.device)
    factor, failed = torch.linalg.cholesky_ex(w)
    half = torch.linalg.solve_triangular(factor, m, upper=False)
    upper = _norm(half) * w.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0).sqrt()
    usable = (failed == 0) & upper.isfinite()
    cauchy_schwarz = math.sqrt(rows) * size
    upper = torch.where(usable, torch.minimum(upper, cauchy_schwarz), cauchy_schwarz)
    rounding = 2 * ROUNDING * math.sqrt(rows) * size
    return (lower - rounding).clamp(min=0), upper + rounding + ROUNDING * rows * value


def resolved_polar_factor(m: Tensor) -> Tensor | None:
    """Return the polar factors of ``m``, or None if one is singular or nearly so; in a CUDA graph that one is NaN.

    The iteration runs to the end, since a gradient's error is first order in the error of the polar factor; the
    value's is second order.
    """
    if len(m) == 0:
        return m
    tall = m.shape[-2] > m.shape[-1]
    wide = m.mT if tall else m
    u, _ = polar_factor(wide / power_of_two(wide)[:, None, None], False, 0.0, "auto")
    eye = torch.eye(u.shape[-2], dtype=u.dtype, device=u.device)
    orthonormal = _norm(u @ u.mT - eye) <= _ORTHONORMAL
    if watched():
        u = nan_unless(orthonormal, u)
    elif not bool(orthonormal.all()):
        return None
    return u.mT if tall else u


@custom_op("fastgan::nuclear_norm_bwd", mutates_args=())
def nuclear_norm_bwd(grad: Tensor, m: Tensor) -> Tensor:
    """``grad`` times the polar factor; directions that M lacks have no gradient."""
    flat = m.reshape(-1, *m.shape[-2:]).double()
    polar = resolved_polar_factor(flat) if by_products(m) else None
    if polar is None:
        u, _, vh = _truncated_svd(flat)
        polar = u @ vh
    return (grad.double().reshape(-1, 1, 1) * polar).to(m.dtype).reshape(m.shape).contiguous()


@custom_op("fastgan::nuclear_norm_bwd_bwd", mutates_args=())
def nuclear_norm_bwd_bwd(cotangent: Tensor, grad: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of <cotangent, nuclear_norm_bwd(grad, m)> with respect to ``grad`` and ``m``."""
    flat, direction = (x.reshape(-1, *m.shape[-2:]).double() for x in (m, cotangent))
    found = _polar_change_by_products(flat, direction) if by_products(m) else None
    polar, change = found or _polar_change(flat, direction)
    grad_grad = (direction * polar).sum((1, 2)).to(grad.dtype).reshape(grad.shape)
    return grad_grad, (grad.double().reshape(-1, 1, 1) * change).to(m.dtype).reshape(m.shape).contiguous()


call = register_derivatives(nuclear_norm, nuclear_norm_bwd, nuclear_norm_bwd_bwd, operands=1)


def _polar_change(m: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return polar factors P of M and their change by ``direction`` = dM, a self-adjoint map of dM.

    With M = U S V^T, P changes by U Y V^T + U S^{-1} (U^T dM) (I - V V^T), Y_ij = (B - B^T)_ij / (s_i + s_j), B = U^T
    dM V, and, if M lacks rows, by (I - U U^T) dM V S^{-1} V^T.
    """
    u, singular, vh = _truncated_svd(m)
    b = u.mT @ direction @ vh.mT
    sums = singular[:, :, None] + singular[:, None, :]
    present = (singular > 0)[:, :, None] & (singular > 0)[:, None, :]
    y = torch.where(present, (b - b.mT) / sums, 0.0)
    inverse = torch.where(singular > 0, singular.reciprocal(), 0.0)
    right = u.mT @ direction - b @ vh
    left = direction @ vh.mT - u @ b
    return u @ vh, u @ (y @ vh + inverse[:, :, None] * right) + (left * inverse[:, None, :]) @ vh


def _polar_change_by_products(m: Tensor, direction: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the same from matrix products and triangular solves; None if M is nearly singular.

    With H = M U^T, U changes by X U + H^{-1} dM (I - U^T U); X solves H X + X H = the skew part of 2 dM U^T.
    """
    polar = resolved_polar_factor(m)
    if polar is None:
        return None
    tall = m.shape[-2] > m.shape[-1]
    m, u, dm = (x.mT if tall else x for x in (m, polar, direction))
    h = symmetric_part(m @ u.mT)
    inside = dm @ u.mT
    x, converged = lyapunov_newton_schulz(h, inside - inside.mT)
    if watched():
        x = nan_unless(converged, x)
    elif not bool(converged.all()):
        return None
    change = x @ u + torch.cholesky_solve(dm - inside @ u, torch.linalg.cholesky_ex(h)[0])
    return polar, change.mT if tall else change


def _truncated_svd(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD; singular values at rounding level are 0, and so are their vectors."""
    u, singular, vh = torch.linalg.svd(m, full_matrices=False)
    floor = max(m.shape[-2:]) * (ROUNDING / 4) * singular[..., :1]
    kept = (singular > floor).to(m.dtype)
    return u * kept[:, None, :], singular * kept, vh * kept[:, :, None]
