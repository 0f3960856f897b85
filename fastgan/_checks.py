"""Argument checks shared by the public functions: each raises before anything is computed and names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class InputError(ValueError):
    """The data, files or options given cannot be used; the message says which and what is allowed.

    A ``ValueError`` like every other argument error of the library. The ``fastgan`` command prints it as one line and
    exits with status 2, where any other exception keeps its traceback.
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


def check_alike(**tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all the named tensors share dtype and device with the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name} ({first.device}), got {tensor.device}")
