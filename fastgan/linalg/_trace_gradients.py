"""``fastgan::trace_sqrt_product_bwd`` and ``_bwd_bwd``: derivatives of tr((A B)^{1/2}).

The gradients are P / 2 and Q / 2 with symmetric P and Q: P A P = B, Q B Q = A and Q = P^{-1}. Differentiating
gives the Lyapunov equation dP A P + P A dP = dB - P dA P. Both are solved by eigenvectors for any A and B. On a GPU,
whose eigensolvers are slow, definite ones are solved by matrix products and triangular solves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan.linalg._dispatch import by_products, nan_unless, watched
from fastgan.linalg._nuclear_norm import resolved_polar_factor
from fastgan.linalg._sqrtm import lyapunov_newton_schulz
from fastgan.linalg._symmetric import ROUNDING, cholesky_if_definite, eigen_factor, scaled, symmetric_part

Solution = tuple[Tensor, Tensor, Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]]
"""P, Q, and a function that maps (V_a, V_b) to (E, Q E Q), E A P + P A E = V_b - P V_a P, or None if it fails."""


@custom_op("fastgan::trace_sqrt_product_bwd", mutates_args=())
def trace_sqrt_product_bwd(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to A and B; ``grad`` has their broadcast batch shape.

    Directions that A or B lacks have no gradient: theirs is infinite.
    """
    (scale_a, wide_a), (scale_b, wide_b) = scaled(a, "reference"), scaled(b, "reference")
    p, q, _ = (_by_products(wide_a, wide_b) if by_products(a) else None) or _by_eigenvectors(wide_a, wide_b)
    ratio = (scale_b.sqrt() / scale_a.sqrt())[..., None, None]
    weight = 0.5 * grad.double()[..., None, None]
    return _sum_to(weight * ratio * p, a), _sum_to(weight / ratio * q, b)


@custom_op("fastgan::trace_sqrt_product_bwd_bwd", mutates_args=())
def trace_sqrt_product_bwd_bwd(
    cotangent_a: Tensor, cotangent_b: Tensor, grad: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <cotangent_a, grad_a> + <cotangent_b, grad_b> with respect to ``grad``, ``a`` and ``b``."""
    (scale_a, wide_a), (scale_b, wide_b) = scaled(a, "reference"), scaled(b, "reference")
    scale_a, scale_b = scale_a[..., None, None], scale_b[..., None, None]
    va, vb = symmetric_part(cotangent_a.double()) / scale_a, symmetric_part(cotangent_b.double()) / scale_b
    changes = None
    if by_products(a) and (solution := _by_products(wide_a, wide_b)) is not None:
        p, q, change = solution
        changes = change(va, vb)
    if changes is None:
        p, q, change = _by_eigenvectors(wide_a, wide_b)
        changes = change(va, vb)
        assert changes is not None
    root = scale_a.sqrt() * scale_b.sqrt()
    traces = (va * p).sum((-2, -1)) + (vb * q).sum((-2, -1))
    weight = 0.5 * grad.double()[..., None, None] * root
    grad_a, grad_b = weight / scale_a * changes[0], -weight / scale_b * changes[1]
    return (0.5 * root[..., 0, 0] * traces).to(grad.dtype), _sum_to(grad_a, a), _sum_to(grad_b, b)


def _sum_to(gradient: Tensor, operand: Tensor) -> Tensor:
    """Sum over broadcast dimensions; symmetric to the last bit, which products of some BLAS are not."""
    return symmetric_part(gradient.sum_to_size(operand.shape)).to(operand.dtype).contiguous()


def _by_eigenvectors(a: Tensor, b: Tensor) -> Solution:
    """P = Z Z^T and Q = W W^T with W^T Z = I; sigma, the diagonal of Z^T A Z, are the values that the trace adds up.

    E = Z Y Z^T, Y_ij = (W^T V_b W - Z^T V_a Z)_ij / (sigma_i + sigma_j).
    """
    factor_a, factor_b = eigen_factor(a)[0], eigen_factor(b)[0]
    u, sigma, vh = torch.linalg.svd(factor_a.mT @ factor_b)
    floor = sigma.shape[-1] * (ROUNDING / 4) * sigma[..., :1]
    inverse_root = torch.where(sigma > floor, sigma.rsqrt(), 0.0)[..., None, :]
    z, w = factor_b @ vh.mT * inverse_root, factor_a @ u * inverse_root

    def change(va: Tensor, vb: Tensor) -> tuple[Tensor, Tensor]:
        sums = sigma[..., :, None] + sigma[..., None, :]
        y = torch.where(sums > 0, (w.mT @ vb @ w - z.mT @ va @ z) / sums, 0.0)
        return z @ y @ z.mT, w @ y @ w.mT

    return z @ z.mT, w @ w.mT, change


def _by_products(a: Tensor, b: Tensor) -> Solution | None:
    """P = H U^T F^{-1} and Q = F U H^{-1} with A = F F^T, B = H H^T, U the polar factor of M = F^T H; None if A or B is
    singular, or within a CUDA graph NaN for that pair.

    D = F^T E F solves the Lyapunov equation T D + D T = F^T (V_b - P V_a P) F of T = F^T P F, the Hermitian polar
    factor of M.
    """
    (f, singular_a), (h, singular_b) = cholesky_if_definite(a), cholesky_if_definite(b)
    if watched():
        f, h = nan_unless(~singular_a, f), nan_unless(~singular_b, h)
    elif bool(singular_a.any() | singular_b.any()):
        return None
    m = f.mT @ h
    u = resolved_polar_factor(m.reshape(-1, *m.shape[-2:]))
    if u is None:
        return None
    u = u.reshape(m.shape)
    p = symmetric_part(torch.linalg.solve_triangular(f, h @ u.mT, upper=False, left=False))
    q = symmetric_part(torch.linalg.solve_triangular(h, f @ u, upper=False, left=False))

    def change(va: Tensor, vb: Tensor) -> tuple[Tensor, Tensor] | None:
        rhs = f.mT @ (vb - p @ va @ p) @ f
        d, converged = lyapunov_newton_schulz(symmetric_part(m @ u.mT), symmetric_part(rhs))
        if watched():
            d = nan_unless(converged, d)
        elif not bool(converged.all()):
            return None
        left = torch.linalg.solve_triangular(f.mT, d, upper=True)
        e = symmetric_part(torch.linalg.solve_triangular(f, left, upper=False, left=False))
        return e, q @ e @ q

    return p, q, change
