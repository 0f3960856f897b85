"""Argument checks shared by the public functions: each raises before anything is computed and names the argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

R = TypeVar("R")

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


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def is_differentiated(*tensors: Tensor) -> bool:
    """True where autograd records what is computed of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def needs_no_dispatch(*tensors: Tensor) -> bool:
    """True where an op of these tensors may be computed by a plain call: neither its gradient nor its graph is wanted.

    The first call of a ``torch.library.custom_op`` imports torch._dynamo, which takes a second or two.
    """
    return not is_differentiated(*tensors) and runs_at_once(*tensors)


def dispatched_if_needed(compute: Callable[..., R], op: Callable[..., R]) -> Callable[..., R]:
    """``op``, made of ``compute``, as a function that calls the latter where :func:`needs_no_dispatch` allows it."""

    def call(*args: Any) -> R:
        plain = needs_no_dispatch(*(x for x in args if isinstance(x, Tensor)))
        return compute(*args) if plain else op(*args)

    return call


def runs_at_once(*tensors: Tensor) -> bool:
    """True where nothing stands between a call and these tensors' memory: no trace, transform, mode or subclass.

    What needs no gradient may then be computed without a pass through torch's dispatcher, which takes Python some
    microseconds for each tensor.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if is_transforming() or torch._C._get_tracing_state() is not None:
        return False
    return all(type(tensor) in _PLAIN and not tensor.is_meta for tensor in tensors)


def is_transforming() -> bool:
    """True within ``torch.func``'s transforms and forward-mode differentiation.

    Ops of ``torch.library`` refuse the former's gradients, and drop tangents in silence.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
