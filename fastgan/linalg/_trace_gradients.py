"""First and second derivatives of tr((A B)^{1/2}) for symmetric positive semi-definite A, B, in plain PyTorch.

The gradients are P / 2 and Q / 2, where P A P = B, Q B Q = A, P and Q symmetric, Q = P^{-1}. They are found by
eigenvectors, for any A and B, or by matrix products and triangular solves, for definite ones where eigensolvers are
slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgan.linalg._nuclear_norm_reference import lyapunov_newton_schulz, power_of_two
from fastgan.linalg._sqrtm_reference import symmetric_part
from fastgan.linalg._trace_reference import cholesky_if_definite

_EPSILON = torch.finfo(torch.float64).eps


def trace_sqrt_product_bwd(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to A and B, by eigenvectors.

    ``grad`` has the broadcast batch shape of ``a`` and ``b``. Directions that A or B lacks have no gradient: theirs is
    infinite.
    """
    z, w, _, scale_a, scale_b = _congruence(a, b)
    weight = 0.5 * grad.double()[..., None, None]
    grad_a = weight * (scale_b.sqrt() / scale_a.sqrt()) * (z @ z.mT)
    grad_b = weight * (scale_a.sqrt() / scale_b.sqrt()) * (w @ w.mT)
    return _sum_to(grad_a, a), _sum_to(grad_b, b)


def trace_sqrt_product_bwd_bwd(
    cotangent_a: Tensor, cotangent_b: Tensor, grad: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <cotangent_a, grad_a> + <cotangent_b, grad_b> with respect to ``grad``, ``a`` and ``b``.

    Differentiating P A P = B gives the Lyapunov equation dP A P + P A dP = dB - P dA P. With P = Z Z^T, Q = W W^T and
    W^T Z = I, Z^T A Z is the diagonal of the singular values sigma, and dP = Z Y Z^T, Y_ij = (W^T dB W - Z^T dA Z)_ij /
    (sigma_i + sigma_j).
    """
    z, w, sigma, scale_a, scale_b = _congruence(a, b)
    va, vb = symmetric_part(cotangent_a.double()) / scale_a, symmetric_part(cotangent_b.double()) / scale_b
    va_z, vb_w = z.mT @ va @ z, w.mT @ vb @ w
    root = scale_a.sqrt() * scale_b.sqrt()
    traces = va_z.diagonal(dim1=-2, dim2=-1).sum(-1) + vb_w.diagonal(dim1=-2, dim2=-1).sum(-1)
    sums = sigma[..., :, None] + sigma[..., None, :]
    y = torch.where(sums > 0, (vb_w - va_z) / sums, 0.0)
    weight = 0.5 * grad.double()[..., None, None] * root
    grad_a = weight / scale_a * (z @ y @ z.mT)
    grad_b = -weight / scale_b * (w @ y @ w.mT)
    return (0.5 * root[..., 0, 0] * traces).to(grad.dtype), _sum_to(grad_a, a), _sum_to(grad_b, b)


def _congruence(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Z, W, sigma and the scales of A and B, with P = Z Z^T, Q = W W^T for A and B divided by their scales."""
    scale_a, scale_b = (power_of_two(m.double())[..., None, None] for m in (a, b))
    factor_a, factor_b = _eigen_factor(a.double() / scale_a), _eigen_factor(b.double() / scale_b)
    u, sigma, vh = torch.linalg.svd(factor_a.mT @ factor_b)
    floor = sigma.shape[-1] * _EPSILON * sigma[..., :1]
    inverse_root = torch.where(sigma > floor, sigma.rsqrt(), 0.0)[..., None, :]
    return factor_b @ vh.mT * inverse_root, factor_a @ u * inverse_root, sigma, scale_a, scale_b


def _eigen_factor(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric_part(matrix))
    floor = values.shape[-1] * _EPSILON * values[..., -1:]
    return vectors * torch.where(values > floor, values, 0.0).sqrt()[..., None, :]


def _sum_to(gradient: Tensor, operand: Tensor) -> Tensor:
    """Sum over broadcast dimensions; symmetric to the last bit, which products of some BLAS are not."""
    return symmetric_part(gradient.sum_to_size(operand.shape)).to(operand.dtype).contiguous()


@dataclass(frozen=True)
class Transport:
    """P and Q of definite A and B divided by their scales, batched as these broadcast.

    Attributes:
        factor: the Cholesky factor F of A, of its own batch shape.
        kernel: F^T P F, symmetric positive definite: the Hermitian polar factor of F^T H, B = H H^T.
    """

    p: Tensor
    q: Tensor
    factor: Tensor
    kernel: Tensor
    scale_a: Tensor
    scale_b: Tensor


def transport_by_products(
    a: Tensor, b: Tensor, polar: Callable[[Tensor], Tensor | None], watched: bool
) -> Transport | None:
    """The polar factor U of M = F^T H, for Cholesky factors of A and B, gives P = H U^T F^{-1} and Q = F U H^{-1}.

    Args:
        polar: the polar factors of (n, d, d), or None where they do not resolve every direction; so is the result then.
        watched: nobody may look at values; else None is returned where a matrix is singular.
    """
    scale_a, scale_b = (power_of_two(m.double())[..., None, None] for m in (a, b))
    f, singular_a = cholesky_if_definite(symmetric_part(a.double() / scale_a))
    h, singular_b = cholesky_if_definite(symmetric_part(b.double() / scale_b))
    if not watched and bool(singular_a.any() | singular_b.any()):
        return None
    m = f.mT @ h
    u = polar(m.reshape(-1, *m.shape[-2:]))
    if u is None:
        return None
    u = u.reshape(m.shape)
    p = torch.linalg.solve_triangular(f, h @ u.mT, upper=False, left=False)
    q = torch.linalg.solve_triangular(h, f @ u, upper=False, left=False)
    return Transport(symmetric_part(p), symmetric_part(q), f, symmetric_part(m @ u.mT), scale_a, scale_b)


def bwd_by_products(grad: Tensor, a: Tensor, b: Tensor, found: Transport) -> tuple[Tensor, Tensor]:
    weight = 0.5 * grad.double()[..., None, None]
    ratio = found.scale_b.sqrt() / found.scale_a.sqrt()
    return _sum_to(weight * ratio * found.p, a), _sum_to(weight / ratio * found.q, b)


def bwd_bwd_by_products(
    cotangent_a: Tensor, cotangent_b: Tensor, grad: Tensor, a: Tensor, b: Tensor, found: Transport, watched: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """With E A P + P A E = R, R = V_b - P V_a P of the cotangents, the gradients are E and -Q E Q, times grad / 2.

    D = F^T E F solves the Lyapunov equation T D + D T = F^T R F of T = F^T P F.
    """
    va, vb = symmetric_part(cotangent_a.double()) / found.scale_a, symmetric_part(cotangent_b.double()) / found.scale_b
    rhs = found.factor.mT @ (vb - found.p @ va @ found.p) @ found.factor
    d, converged = lyapunov_newton_schulz(found.kernel, symmetric_part(rhs))
    if not watched and not bool(converged.all()):
        return None
    left = torch.linalg.solve_triangular(found.factor.mT, d, upper=True)
    e = symmetric_part(torch.linalg.solve_triangular(found.factor, left, upper=False, left=False))
    root = found.scale_a.sqrt() * found.scale_b.sqrt()
    traces = (va * found.p).sum((-2, -1)) + (vb * found.q).sum((-2, -1))
    weight = 0.5 * grad.double()[..., None, None] * root
    grad_a, grad_b = weight / found.scale_a * e, -weight / found.scale_b * (found.q @ e @ found.q)
    return (0.5 * root[..., 0, 0] * traces).to(grad.dtype), _sum_to(grad_a, a), _sum_to(grad_b, b)
