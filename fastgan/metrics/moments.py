"""Mean and scatter (the sum of centered outer products) of vectors, in float64, and checks of those that users give.

Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError, check_finite


def centered(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (dim,) of ``rows`` (n, dim), and the rows without it."""
    mean = rows.mean(dim=0)
    without = rows - mean
    # the mean of large values carries a rounding error; what it leaves in the centered rows is taken out again
    residual = without.mean(dim=0)
    return mean + residual, without.sub_(residual)


def moments_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (dim,) and scatter (dim, dim) of ``rows`` (n, dim)."""
    mean, without = centered(rows)
    return mean, without.mT @ without


def joined(
    n: int | Tensor, mean: Tensor, scatter: Tensor, m: int | Tensor, other_mean: Tensor, other_scatter: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and scatter of n and m vectors together; neither side is changed. The moments of no vectors are zeros."""
    total = n + m
    share = m / (total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1))
    delta = other_mean - mean
    return mean + delta * share, (scatter + other_scatter).addr_(delta * (n * share), delta)


def as_features(name: str, value: Any) -> Tensor:
    """``value`` as a tensor: a tensor, or an array of any strides and byte order. Raises ``InputError`` naming it for
    anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.asarray(value)
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))
    except (TypeError, ValueError) as error:
        found = f"an array of dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{name} must be a tensor or an array of numbers, got {found}") from error


def as_float64(value: Any) -> Tensor:
    """A copy of a tensor or an array. Raises ``InputError`` for complex numbers."""
    tensor = as_features("statistics", value)
    if tensor.is_complex():
        raise InputError("statistics must be real, got complex numbers")
    return tensor.to(device=float64_device(tensor.device), dtype=torch.float64, copy=True)


def float64_device(device: torch.device) -> torch.device:
    """The device of statistics of features on ``device``: the CPU for Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def rounding_of(cov: Any) -> float:
    """Return the asymmetry, relative to its largest variance, that rounding gives a covariance of this dtype."""
    dtype = as_features("cov", cov).dtype
    return max(1e-5, 8 * torch.finfo(dtype).eps) if dtype.is_floating_point else 1e-5


def check_moments(mean: Tensor, cov: Tensor, rounding: float) -> None:
    """Raise ``InputError`` unless ``mean`` (dim,) and ``cov`` (dim, dim) are finite, ``cov`` symmetric to ``rounding``
    with no negative variance."""
    if mean.ndim != 1 or mean.shape[0] == 0:
        raise InputError(f"mean must have shape (dim,), got {tuple(mean.shape)}")
    dim = mean.shape[0]
    if cov.shape != (dim, dim):
        raise InputError(f"cov must have shape ({dim}, {dim}) to go with mean, got {tuple(cov.shape)}")
    check_finite(mean=mean, cov=cov)
    if (cov - cov.mT).abs().max() > rounding * cov.diagonal().abs().max():
        raise InputError("cov must be symmetric")
    if cov.diagonal().min() < 0:
        raise InputError("cov must have no negative value on its diagonal")


def check_factor(factor: Tensor, cov: Tensor, n: int | None) -> None:
    """Raise ``InputError`` unless ``factor`` (n, dim) holds the centered vectors behind ``cov``."""
    if n is None or factor.shape != (n, cov.shape[0]):
        raise InputError(f"factor must have shape (n, dim) = ({n}, {cov.shape[0]}), got {tuple(factor.shape)}")
    check_finite(factor=factor)
    variance = cov.diagonal()
    scale = variance.max()
    off_mean = factor.mean(dim=0).abs().max() > 1e-6 * scale.sqrt()
    off_variance = (factor.square().sum(dim=0) / (n - 1) - variance).abs().max() > 1e-6 * scale
    if off_mean or off_variance:
        raise InputError("factor must be the centered vectors behind mean and cov")


def check_root(root: Tensor, cov: Tensor) -> None:
    """Raise ``InputError`` unless ``root`` (r, dim) has root^T root = ``cov``."""
    if root.ndim != 2 or not 0 < root.shape[0] <= root.shape[1] or root.shape[1] != cov.shape[0]:
        raise InputError(f"root must have shape (r, dim) with r <= dim = {cov.shape[0]}, got {tuple(root.shape)}")
    check_finite(root=root)
    # R^T R v = cov v for one v of which no two entries are alike: the product R^T R would cost as much as a root
    v = torch.linspace(1, 2, cov.shape[0], dtype=cov.dtype, device=cov.device).sin()
    off = (root.mT @ (root @ v) - cov @ v).abs().max() / (cov.diagonal().max() * len(v) ** 0.5).clamp(min=1e-300)
    if off > 1e-6:
        raise InputError(f"root must have root^T root = cov: they differ by {off.item():.2g} of the largest variance")
