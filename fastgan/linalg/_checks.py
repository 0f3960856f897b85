"""Argument checks of :mod:`fastgan.linalg`: each error names the argument and the violation that was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._checks import check_alike, check_tensor
from fastgan.linalg._symmetric import INDEFINITE
from fastgan.linalg._transforms import values_of

DTYPES = (torch.float32, torch.float64)
ASYMMETRIC = 1e-5
"""A difference between A and its transpose above this share of the largest entry is no rounding error."""

_BLOCK = 128


def check_options(**options: tuple[str, Sequence[str]]) -> None:
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_square(name: str, operand: Tensor) -> None:
    check_tensor(name, operand, dtypes=DTYPES)
    if operand.ndim < 2 or operand.shape[-1] != operand.shape[-2] or operand.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., d, d) with d >= 1, got {tuple(operand.shape)}")


def check_matrix(name: str, operand: Tensor) -> None:
    check_tensor(name, operand, dtypes=DTYPES)
    if operand.ndim < 2 or 0 in operand.shape[-2:]:
        raise ValueError(f"{name} must have shape (..., n, d) with n, d >= 1, got {tuple(operand.shape)}")


def check_pair(a: str, left: Tensor, b: str, right: Tensor) -> None:
    """Raise unless operands that were checked each by itself share dtype, device and d, and their batches broadcast."""
    check_alike(**{a: left, b: right})
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(f"{b} must have the d of {a} ({left.shape[-1]}), got {right.shape[-1]}")
    try:
        batch_shape(left, right)
    except RuntimeError:
        shapes = f"{tuple(left.shape[:-2])}, got {tuple(right.shape[:-2])}"
        raise ValueError(f"{b} must have batch dimensions that broadcast with those of {a}: {shapes}") from None


def batch_shape(a: Tensor, b: Tensor) -> torch.Size:
    """The batch dimensions of the values. Raises RuntimeError if those of the operands do not broadcast."""
    left, right = a.shape[:-2], b.shape[:-2]
    if left == right:  # the first call of torch.broadcast_shapes imports sympy for a second
        return left
    return torch.broadcast_shapes(left, right)


def _where(name: str, index: int, count: int) -> str:
    return f"{name}, matrix {index} of the flattened batch," if count > 1 else name


def check_finite(name: str, operand: Tensor) -> None:
    entries = values_of(operand).reshape(-1, operand.shape[-2] * operand.shape[-1])
    if bool(entries.sum().isfinite()):  # one pass; a sum of finite entries that overflows takes the second
        return
    finite = entries.isfinite().all(-1)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise ValueError(_not_finite(name, entries, index))


def _not_finite(name: str, matrices: Tensor, index: int) -> str:
    matrix = matrices[index]
    bad = matrix.numel() - int(matrix.isfinite().sum())
    return f"{_where(name, index, len(matrices))} must be finite, got {bad} NaN or infinite of {matrix.numel()} entries"


def check_symmetric(name: str, operand: Tensor, impl: str) -> None:
    """Raise unless every matrix is finite and symmetric up to rounding."""
    flat = values_of(operand).reshape(-1, *operand.shape[-2:])
    for index, (gap, largest) in enumerate(asymmetry(flat, impl).tolist()):
        if not (gap < math.inf and largest < math.inf):
            raise ValueError(_not_finite(name, flat, index))
        if gap > ASYMMETRIC * largest:
            share = f"max |A - A^T| is {gap:.3g}, {gap / largest:.2g} of the largest entry (allowed: {ASYMMETRIC:g})"
            raise ValueError(f"{_where(name, index, len(flat))} must be symmetric: {share}")


def asymmetry(a: Tensor, impl: str) -> Tensor:
    """Return the largest magnitudes of A - A^T and of A for ``a`` (n, d, d), as (n, 2).

    They are not finite if an entry of A is not.

    ``impl`` is resolved. On a CPU the extension reads each matrix once.
    """
    if impl == "extension" and not a.is_cuda:
        return torch.ops.fastgan_C.asymmetry(a)
    gaps = [
        (a[:, i : i + _BLOCK, i:] - a[:, i:, i : i + _BLOCK].mT).abs().amax((1, 2))
        for i in range(0, a.shape[-1], _BLOCK)
    ]
    # amax carries NaN along, and an infinite entry makes its own difference infinite or NaN.
    return torch.stack([torch.stack(gaps, 1).amax(1), torch.maximum(a.amax((1, 2)), -a.amin((1, 2)))], 1).double()


def check_eigenvalues(name: str, operand: Tensor, definite: bool = False) -> None:
    """Raise if an eigenvalue is clearly below zero, or with ``definite`` at rounding level or below.

    Costs one Cholesky factorization if none is.
    """
    wide = values_of(operand).double().reshape(-1, *operand.shape[-2:])
    d, info = wide.shape[-1], torch.finfo(torch.float64)
    size = torch.linalg.matrix_norm(wide) if definite else wide.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    floor = d * info.eps if definite else -INDEFINITE
    shift = floor * size.clamp(min=info.tiny)[:, None, None] * torch.eye(d).to(wide)
    if not bool(torch.linalg.cholesky_ex(wide - shift)[1].any()):
        return
    check_spectrum(name, torch.linalg.eigvalsh(wide), definite)


def allowed_spectra(values: Tensor, definite: bool = False) -> Tensor:
    """Return which of the ascending eigenvalues (n, d) :func:`check_spectrum` allows, without reading a value."""
    return _smallest_shares(values) > _floor(values, definite)


def _smallest_shares(values: Tensor) -> Tensor:
    return values[:, 0] / values.abs().amax(-1).clamp(min=torch.finfo(torch.float64).tiny)


def _floor(values: Tensor, definite: bool) -> float:
    return values.shape[-1] * torch.finfo(torch.float64).eps if definite else -INDEFINITE


def check_spectrum(name: str, values: Tensor, definite: bool = False) -> None:
    """Raise as :func:`check_eigenvalues` does, for ascending eigenvalues (n, d) that are known."""
    floor, shares = _floor(values, definite), _smallest_shares(values)
    index = int(shares.argmin())
    share = shares[index].item()
    if share <= floor:
        kind = "definite for inverse=True" if definite else "semi-definite"
        allowed = f"it must be above {floor:.2g}" if definite else f"allowed: {floor:g}"
        raise ValueError(
            f"{_where(name, index, len(values))} must be positive {kind}: its smallest eigenvalue is {share:.2g} of "
            f"the largest ({allowed})"
        )
