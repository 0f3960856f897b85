"""Argument checks shared by the public functions: each raises before anything is computed and names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class InputError(ValueError):
    """Data, files or options that cannot be used; the message names them and what is allowed.

    A ``ValueError`` like every other argument error of the library. The ``fastgan`` command prints it as one line and
    exits with status 2; any other exception keeps its traceback.
    """


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(name: str, value: object, *, ndim: int | None = None, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise unless ``value`` is a tensor of rank ``ndim`` (any, if None) and one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must have dtype {_names(dtypes)}, got {str(value.dtype).removeprefix('torch.')}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_seed(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer that every generator takes as its seed."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise ValueError(f"{name} must be an integer from 0 to {(1 << 32) - 1}, got {value!r}")


def check_alike(**tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all the named tensors share dtype and device with the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name} ({first.device}), got {tensor.device}")


def check_finite(**tensors: Tensor) -> None:
    """Raise ``InputError`` unless every value of the named tensors is finite."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{name} must be finite, it has NaN or infinity")


def check_features(*, least: int, **features: Tensor) -> None:
    """Raise ``InputError`` unless all named tensors are floating-point, finite and (n, dim) with n >= ``least``, of one
    dim."""
    for name, rows in features.items():
        if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
            raise InputError(
                f"{name} must be floating-point features (n, dim), got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        if len(rows) < least:
            raise InputError(f"{name} must have at least {least} feature vectors, it has {len(rows)}")
        check_finite(**{name: rows})
    dims = [rows.shape[1] for rows in features.values()]
    if len(set(dims)) > 1:
        raise InputError(f"{' and '.join(features)} must have features of one dim, got {' and '.join(map(str, dims))}")
