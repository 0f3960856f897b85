"""Mean and scatter of vectors, the sum of their centred outer products: in float64, and joined without loss of digits.

Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan._checks import InputError


def centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (dim,) of ``rows`` (n, dim), and the rows without it."""
    mean = rows.mean(dim=0)
    without = rows - mean
    # the mean of large values carries a rounding error; what it leaves in the centred rows is taken out again
    residual = without.mean(dim=0)
    return mean + residual, without.sub_(residual)


def moments_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (dim,) and scatter (dim, dim) of ``rows`` (n, dim)."""
    mean, without = centred(rows)
    return mean, without.mT @ without


def joined(
    n: int | Tensor, mean: Tensor, scatter: Tensor, m: int | Tensor, other_mean: Tensor, other_scatter: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and scatter of n and m vectors together, neither side changed; zeros for none at all."""
    total = n + m
    share = m / (total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1))
    delta = other_mean - mean
    return mean + delta * share, (scatter + other_scatter).addr_(delta * (n * share), delta)


def as_float64(value: Any) -> Tensor:
    """A copy of a tensor or an array. Raises ``InputError`` for complex numbers."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    if tensor.is_complex():
        raise InputError("statistics must be real, got complex numbers")
    return tensor.to(device=float64_device(tensor.device), dtype=torch.float64, copy=True)


def float64_device(device: torch.device) -> torch.device:
    """Apple's GPUs have no float64; their features are gathered on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device
