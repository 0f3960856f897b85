"""A^{1/2} and A^{-1/2} of symmetric positive semi-definite matrices (n, d, d) in float64, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.reference.nuclear_norm import scaled_newton_schulz

EPSILON = torch.finfo(torch.float64).eps
_SMALLEST = 1e-8


def sqrtm_eigh(a: Tensor, inverse: bool) -> Tensor:
    """Through eigenvectors. Eigenvalues up to d * 2.2e-16 of the largest count as zero, also in the inverse."""
    values, vectors = torch.linalg.eigh(_symmetric(a))
    floor = values.shape[-1] * EPSILON * values[..., -1:].abs()
    roots = torch.where(values > floor, values.rsqrt() if inverse else values.sqrt(), 0.0)
    return (vectors * roots[..., None, :]) @ vectors.mT


def sqrtm_newton_schulz(a: Tensor, inverse: bool) -> Tensor:
    """From matrix products alone: the coupled iteration (Higham, "Functions of Matrices", 2008, section 6.7), scaled.

    Y (Z Y)^{-1/2} and (Z Y)^{-1/2} Z stay as they are while Z Y goes to I, so Y ends at A^{1/2} and Z at A^{-1/2}.
    """
    scale = a.square().sum((-2, -1), keepdim=True).sqrt()
    y = torch.where(scale > 0, a / scale, 0.0)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = eye.expand_as(a)
    for linear, cubic in scaled_newton_schulz(_SMALLEST):
        t = linear * eye - cubic * (z @ y)
        y, z = y @ t, t @ z
    return _symmetric(z) / scale.sqrt() if inverse else _symmetric(y) * scale.sqrt()


def lyapunov(root: Tensor, rhs: Tensor) -> Tensor:
    """The symmetric X with root X + X root = (rhs + rhs^T) / 2, zero between directions that ``root`` lacks."""
    values, vectors = torch.linalg.eigh(_symmetric(root))
    sums = values[..., :, None] + values[..., None, :]
    floor = (values.shape[-1] * EPSILON) ** 0.5 * values[..., -1].abs()[..., None, None]
    rotated = vectors.mT @ _symmetric(rhs) @ vectors
    return vectors @ torch.where(sums > floor, rotated / sums, 0.0) @ vectors.mT


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
