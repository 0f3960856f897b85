"""How far a result is from the reference's: what workloads give as their ``check``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def relative_norm(result: Tensor, reference: Tensor) -> float:
    """|result - reference| / |reference| in the Frobenius norm, computed in float64."""
    b = reference.detach().double()
    a = result.detach().to(b.device).double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def largest_relative_norm(results: Sequence[Tensor | None], references: Sequence[Tensor | None]) -> float:
    """The largest :func:`relative_norm` of a pair; where the reference is zero or None there is none."""
    pairs = [(a, b) for a, b in zip(results, references, strict=True) if b is not None and bool(b.count_nonzero())]
    return max(math.inf if a is None else relative_norm(a, b) for a, b in pairs)


def relative_difference(result: Tensor | float, reference: Tensor | float) -> float:
    """The largest relative difference of an entry."""
    b = torch.as_tensor(reference).detach().double()
    a = torch.as_tensor(result).detach().to(b.device).double()
    return ((a - b).abs() / b.abs()).max().item()
