"""What statistics from elsewhere must satisfy: each check raises an ``InputError`` that names what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._checks import InputError


def check_finite(batch: Tensor, *, seen: int) -> None:
    """No vector of ``batch`` (n, dim) has NaN or infinity; the row is named, ``seen`` came before it."""
    finite = torch.isfinite(batch).all(dim=1)
    if not finite.all():
        row = int(torch.nonzero(~finite)[0])
        raise InputError(
            f"features must be finite: row {row} of this batch (vector {seen + row} in all) has NaN or infinity"
        )


def check_moments(mean: Tensor, cov: Tensor) -> None:
    """``mean`` (dim,) and ``cov`` (dim, dim) are finite, ``cov`` symmetric with no negative variance."""
    if mean.ndim != 1 or mean.shape[0] == 0:
        raise InputError(f"mean must have shape (dim,), got {tuple(mean.shape)}")
    dim = mean.shape[0]
    if cov.shape != (dim, dim):
        raise InputError(f"cov must have shape ({dim}, {dim}) to go with mean, got {tuple(cov.shape)}")
    for name, value in (("mean", mean), ("cov", cov)):
        if not torch.isfinite(value).all():
            raise InputError(f"{name} must be finite, it has NaN or infinity")
    scale = cov.diagonal().abs().max()
    if (cov - cov.mT).abs().max() > 1e-5 * scale:
        raise InputError("cov must be symmetric")
    if cov.diagonal().min() < 0:
        raise InputError("cov must have no negative value on its diagonal")


def check_factor(factor: Tensor, cov: Tensor, n: int | None) -> None:
    """``factor`` (n, dim) holds the centred vectors behind ``cov``."""
    if n is None or factor.shape != (n, cov.shape[0]):
        raise InputError(f"factor must have shape (n, dim) = ({n}, {cov.shape[0]}), got {tuple(factor.shape)}")
    if not torch.isfinite(factor).all():
        raise InputError("factor must be finite, it has NaN or infinity")
    variance = cov.diagonal()
    scale = variance.max()
    off_mean = factor.mean(dim=0).abs().max() > 1e-6 * scale.sqrt()
    off_variance = (factor.square().sum(dim=0) / (n - 1) - variance).abs().max() > 1e-6 * scale
    if off_mean or off_variance:
        raise InputError("factor must be the centred vectors behind mean and cov")


def check_root(root: Tensor, cov: Tensor) -> None:
    """``root`` (r, dim) has root^T root = ``cov``."""
    if root.ndim != 2 or not 0 < root.shape[0] <= root.shape[1] or root.shape[1] != cov.shape[0]:
        raise InputError(f"root must have shape (r, dim) with r <= dim = {cov.shape[0]}, got {tuple(root.shape)}")
    if not torch.isfinite(root).all():
        raise InputError("root must be finite, it has NaN or infinity")
    # R^T R v = cov v for one v of which no entry is alike: the product R^T R itself would cost as much as a root
    v = torch.linspace(1, 2, cov.shape[0], dtype=cov.dtype, device=cov.device).sin()
    off = (root.mT @ (root @ v) - cov @ v).abs().max() / (cov.diagonal().max() * len(v) ** 0.5).clamp(min=1e-300)
    if off > 1e-6:
        raise InputError(f"root must have root^T root = cov: they differ by {off.item():.2g} of the largest variance")
