"""A^{1/2} and A^{-1/2} of symmetric positive semi-definite matrices (n, d, d) in float64, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.linalg._nuclear_norm_reference import scaled_newton_schulz

EPSILON = torch.finfo(torch.float64).eps


def sqrtm_eigh(a: Tensor, inverse: bool) -> Tensor:
    """Of symmetric ``a``, through eigenvectors. Eigenvalues up to d * 2.2e-16 of the largest count as zero, also in the
    inverse."""
    values, vectors = torch.linalg.eigh(a)
    floor = values.shape[-1] * EPSILON * values[..., -1:].abs()
    roots = torch.where(values > floor, values.rsqrt() if inverse else values.sqrt(), 0.0)
    return symmetric_part((vectors * roots[..., None, :]) @ vectors.mT)


def sqrtm_newton_schulz(a: Tensor, inverse: bool) -> Tensor:
    """From matrix products alone: the coupled iteration (Higham, "Functions of Matrices", 2008, section 6.7), scaled.

    Y (Z Y)^{-1/2} and (Z Y)^{-1/2} Z stay as they are while Z Y goes to I, so Y ends at A^{1/2} and Z at A^{-1/2}.
    Eigenvalues are resolved down to 1e-10 of |A|_F, for the inverse to 1e-16: rounding leaves the zeros of a singular
    matrix at about -1e-17, and what is below zero grows without end where it is given the time.
    """
    scale = a.square().sum((-2, -1), keepdim=True).sqrt()
    y = torch.where(scale > 0, a / scale, 0.0)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = eye.expand_as(a)
    for linear, cubic in scaled_newton_schulz(1e-8 if inverse else 1e-5):
        t = linear * eye - cubic * (z @ y)
        y, z = y @ t, t @ z
    return symmetric_part(z) / scale.sqrt() if inverse else symmetric_part(y) * scale.sqrt()


def residual(a: Tensor, root: Tensor, inverse: bool) -> Tensor:
    """|R R - A| / |A|, or |R A R - I| / |I| for the inverse root, in Frobenius norms, (n,)."""
    target = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a) if inverse else a
    found = root @ a @ root if inverse else root @ root
    size = torch.linalg.matrix_norm(target)
    return torch.linalg.matrix_norm(found - target) / torch.where(size > 0, size, 1.0)


def lyapunov(root: Tensor, rhs: Tensor) -> Tensor:
    """The symmetric X with root X + X root = (rhs + rhs^T) / 2, zero between directions that ``root``, which is
    symmetric, lacks."""
    values, vectors = torch.linalg.eigh(root)
    sums = values[..., :, None] + values[..., None, :]
    floor = (values.shape[-1] * EPSILON) ** 0.5 * values[..., -1].abs()[..., None, None]
    rotated = vectors.mT @ symmetric_part(rhs) @ vectors
    return symmetric_part(vectors @ torch.where(sums > floor, rotated / sums, 0.0) @ vectors.mT)


def symmetric_part(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
