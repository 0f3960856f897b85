"""||M||_*, the sum of the singular values, its polar factor and first two derivatives, in plain PyTorch.

Any U with ||U||_2 <= 1 gives <U, M> <= ||M||_*, with equality at the polar factor, where the value is stationary: an
error e in U costs O(e^2). :func:`polar_factor` finds U from matrix products alone, and is the algorithm of
csrc/nuclear_norm.h, step by step. Matrices here are batched, (n, rows, cols) with rows <= cols, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SVD, GRAM, POLAR = 0, 1, 2
METHODS = {"svd": SVD, "gram": GRAM, "polar": POLAR}

_EPSILON = torch.finfo(torch.float64).eps
_NOISE = 4 * _EPSILON
_PASSES = 2
_SMALLEST = 1e-7
_NEWTON_SCHULZ = (1.5, 0.5)
_ORTHONORMAL = 1e-7


def power_of_two(matrices: Tensor) -> Tensor:
    """Of matrices (..., rows, cols) the power of two at or below the largest magnitude, 1 for zero: dividing by it is
    exact."""
    if matrices.numel() == 0:
        return matrices.new_ones(matrices.shape[:-2])
    largest = torch.maximum(matrices.amax((-2, -1)), -matrices.amin((-2, -1)))
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest > 0, largest / (2 * mantissa), 1.0)


def scaled_newton_schulz(smallest: float) -> list[tuple[float, float]]:
    """(linear, cubic) of the steps x <- linear x - cubic x^3 that bring [smallest, 1] within 1e-8 of 1, and one more.

    3 rho / 2 and rho^3 / 2 with rho^2 = 3 / (1 + l + l^2) for values in [l, 1] (Chen & Chow, "A stable scaling of
    Newton-Schulz for improving the sign function computation of a Hermitian matrix", 2014), but at most 2.8: near
    l = 0 the optimum sends 1 to almost 0, where rounding would drown it.
    """
    steps, low = [], smallest
    while 1 - low > 1e-8:
        rho = math.sqrt(min(2.8, 3 / (1 + low + low * low)))
        linear, cubic = 1.5 * rho, 0.5 * rho**3
        steps.append((linear, cubic))
        low = min(linear * low - cubic * low**3, linear - cubic)
    return [*steps, _NEWTON_SCHULZ]


def polar_factor(m: Tensor, low_precision: bool, tolerance: float) -> tuple[Tensor, Tensor]:
    """Polar factors (n, rows, cols), and (n, 3): value, error estimate, iterations. Entries of about 1 or below.

    Args:
        low_precision: float32 iterations first, polished in float64; float64 ones follow where that was not enough.
        tolerance: a matrix whose error estimate is below this share of its value is done.
    """
    gram = m @ m.mT
    scale = gram.square().sum((1, 2)).sqrt().sqrt()[:, None, None] * (1 + 1e-12)
    start = torch.where(scale > 0, m / scale, 0.0)
    x, iterations = torch.zeros_like(m), m.new_zeros(len(m))
    done = torch.zeros(len(m), dtype=torch.bool, device=m.device)
    value, error = m.new_zeros(len(m)), m.new_zeros(len(m))
    passes = [(start, scaled_newton_schulz(_SMALLEST))] + [(None, scaled_newton_schulz(_SMALLEST))] * (_PASSES - 1)
    if low_precision:
        warm, steps = start.float(), scaled_newton_schulz(_SMALLEST)
        iterations += len(steps)
        passes.insert(0, (_iterate(warm, steps).double(), [_NEWTON_SCHULZ] * 2))
    for begin, steps in passes:
        iterations = torch.where(done, iterations, iterations + len(steps))
        active = done[:, None, None]
        x = torch.where(active, x, _iterate(x if begin is None else begin, steps))
        value, error = _measure(m, x)
        done = done | (error <= tolerance * value)
        if done.all():
            break
    return x, torch.stack([value, error, iterations], 1)


def _iterate(x: Tensor, steps: list[tuple[float, float]]) -> Tensor:
    for linear, cubic in steps:
        x = linear * x - cubic * ((x @ x.mT) @ x)
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

    Lower: <U, M> / ||U||_2, where each eigenvalue g of G = U U^T obeys |g^2 - g| <= |G^2 - G|_F, so that g is at most 1
    plus that. Upper: (tr(W) tr(M^T W^{-1} M))^{1/2} for any positive definite W, least at W = (M M^T)^{1/2}; here W is
    the symmetric part of M U^T, shifted by what is known to be wrong with it.
    """
    value, h, gram = (m * u).sum((1, 2)), m @ u.mT, u @ u.mT
    rows, size = m.shape[1], _norm(m)
    lower = value / (1 + _norm(gram @ gram - gram)).sqrt()
    wrong = _norm(0.5 * (h - h.mT)) + _norm(m - h @ u) + 2 * _NOISE * _norm(h)
    w = 0.5 * (h + h.mT) + wrong[:, None, None] * torch.eye(rows, dtype=m.dtype, device=m.device)
    factor, failed = torch.linalg.cholesky_ex(w)
    half = torch.linalg.solve_triangular(factor, m, upper=False)
    upper = _norm(half) * w.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0).sqrt()
    usable = (failed == 0) & upper.isfinite()
    cauchy_schwarz = math.sqrt(rows) * size
    upper = torch.where(usable, torch.minimum(upper, cauchy_schwarz), cauchy_schwarz)
    rounding = 2 * _NOISE * math.sqrt(rows) * size
    return (lower - rounding).clamp(min=0), upper + rounding + _NOISE * rows * value


def nuclear_norm_svd(m: Tensor) -> tuple[Tensor, Tensor]:
    """Values and error bounds, both (n,), from singular values."""
    singular = torch.linalg.svdvals(m)
    noise = _NOISE * torch.linalg.vector_norm(singular, dim=-1)
    return singular.sum(-1), noise * math.sqrt(singular.shape[-1])


def nuclear_norm_gram(m: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values, error bounds, and whether the bound is within ``tolerance`` of the value, from eigenvalues of M M^T."""
    return root_sum(torch.linalg.eigvalsh(m @ m.mT), tolerance)


def root_sum(eigenvalues: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the last dimension of the square roots of ``eigenvalues``, which are in ascending order, a bound on its
    error, and whether that is within ``tolerance`` of the sum and no eigenvalue is clearly negative.

    The eigensolver's error E changes the sum by <E, G^{-1/2}> / 2, by Cauchy-Schwarz at most |E| |G^{-1/2}| / 2 in
    Frobenius norms, where an eigenvalue stands above |E|, and by sqrt(|E|) where it does not.
    """
    noise = _NOISE * torch.linalg.vector_norm(eigenvalues, dim=-1, keepdim=True)
    clipped = eigenvalues.clamp(min=0)
    resolved = eigenvalues > 4 * noise
    value = clipped.sqrt().sum(-1)
    bound = noise[..., 0] * torch.where(resolved, eigenvalues.reciprocal(), 0.0).sum(-1).sqrt() / 2
    bound = bound + torch.where(resolved, 0.0, (noise + clipped).sqrt()).sum(-1)
    accurate = (eigenvalues[..., 0] >= -noise[..., 0]) & (bound <= tolerance * value)
    return value, bound, accurate


def nuclear_norm_bwd(grad: Tensor, m: Tensor) -> Tensor:
    """``grad`` times the polar factor of m (n, rows, cols); directions that M lacks have no gradient."""
    u, _, vh = _truncated_svd(m)
    return grad[:, None, None] * (u @ vh)


def nuclear_norm_bwd_bwd(cotangent: Tensor, grad: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of <cotangent, nuclear_norm_bwd(grad, m)> with respect to ``grad`` and ``m``.

    With M = U S V^T, the polar factor P changes by U Y V^T + U S^{-1} (U^T dM) (I - V V^T), Y_ij = (B - B^T)_ij /
    (s_i + s_j), B = U^T dM V, a self-adjoint map, and, where M lacks rows, by (I - U U^T) dM V S^{-1} V^T.
    """
    u, singular, vh = _truncated_svd(m)
    b = u.mT @ cotangent @ vh.mT
    sums = singular[:, :, None] + singular[:, None, :]
    present = (singular > 0)[:, :, None] & (singular > 0)[:, None, :]
    y = torch.where(present, (b - b.mT) / sums, 0.0)
    inverse = torch.where(singular > 0, singular.reciprocal(), 0.0)
    right = u.mT @ cotangent - b @ vh
    left = cotangent @ vh.mT - u @ b
    curvature = u @ (y @ vh + inverse[:, :, None] * right) + (left * inverse[:, None, :]) @ vh
    return (cotangent * (u @ vh)).sum((1, 2)), grad[:, None, None] * curvature


def has_orthonormal_rows(u: Tensor) -> Tensor:
    """Whether the polar iteration resolved every direction: not where M lacks one, or nearly does."""
    eye = torch.eye(u.shape[-2], dtype=u.dtype, device=u.device)
    return _norm(u @ u.mT - eye) <= _ORTHONORMAL


def bwd_bwd_by_products(cotangent: Tensor, grad: Tensor, m: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`nuclear_norm_bwd_bwd` for rows <= cols, from polar factors with orthonormal rows; and convergence.

    With H = M U^T, U changes by X U + H^{-1} dM (I - U^T U), where H X + X H is the skew part of 2 dM U^T.
    """
    h = m @ u.mT
    h = 0.5 * (h + h.mT)
    inside = cotangent @ u.mT
    x, converged = lyapunov_newton_schulz(h, inside - inside.mT)
    outside = torch.cholesky_solve(cotangent - inside @ u, torch.linalg.cholesky_ex(h)[0])
    return (cotangent * u).sum((1, 2)), grad[:, None, None] * (x @ u + outside), converged


def lyapunov_newton_schulz(s: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """X with S X + X S = ``rhs`` for positive definite S, from matrix products alone, and whether that has converged.

    The sign function of [[S, G], [0, -S]] is [[I, 2 X], [0, -I]] (Roberts, "Linear model reduction and solution of the
    algebraic Riccati equation by use of the sign function", 1980), found by scaled Newton-Schulz steps x <- linear x -
    cubic x^3 on the two blocks. Eigenvalues are resolved down to 1e-8 of |S|_F; smaller ones do not converge.
    """
    scale = torch.linalg.matrix_norm(s, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    s, g = 0.5 * (s + s.mT) / scale, rhs / scale
    for linear, cubic in scaled_newton_schulz(1e-8):
        square = s @ s
        s, g = linear * s - cubic * (square @ s), linear * g - cubic * (square @ g - s @ g @ s + g @ square)
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    return 0.5 * g, _norm(s - eye) <= 1e-6


def _truncated_svd(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD; singular values at rounding level are 0, and so are their vectors."""
    u, singular, vh = torch.linalg.svd(m, full_matrices=False)
    floor = max(m.shape[-2:]) * _EPSILON * singular[..., :1]
    kept = (singular > floor).to(m.dtype)
    return u * kept[:, None, :], singular * kept, vh * kept[:, :, None]
