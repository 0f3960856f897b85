"""Calling ops: the dtypes that autocast asks for, and when an op's body may be called past torch's dispatcher."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return autocast's dtype if it is active and applies to ``x``, else None."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of ``x``; there is none on "meta"."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()  # exported graphs would hold the context
    return torch.autocast(x.device.type, enabled=False)


def outside_autocast(function: F) -> F:
    """Make ``function`` of tensors compute in the dtypes that it is given, even if it is called under autocast.

    An op's body is also called from a captured graph, which knows no autocast: both calls must give the same numbers.
    """

    @functools.wraps(function)
    def body(*args: Any) -> Any:
        first = args[0]
        with no_autocast(first if isinstance(first, Tensor) else first[0]):
            return function(*args)

    # An op's schema is read from these types, which the names of this module would not resolve.
    body.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return body  # type: ignore[return-value]


def is_differentiated(*tensors: Tensor) -> bool:
    """Return whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_transforming() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is active.

    Ops of ``torch.library`` refuse the former's gradients, and drop tangents in silence.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Return whether ``torch.export``, ``torch.onnx.export`` or ``torch.jit.trace`` records what is computed.

    The graph may be run where there is no fastgan, so that it must consist of torch's own operators.
    """
    if torch.compiler.is_compiling():
        # What torch.compiler.is_exporting() returns, which the dynamo of torch 2.11 takes to be True in every graph.
        return bool(torch.compiler._is_exporting_flag)
    return torch._C._get_tracing_state() is not None


def runs_at_once(*tensors: Tensor) -> bool:
    """Return whether nothing stands between a call and these tensors' memory: no trace, transform, mode or subclass.

    What needs no gradient may then be computed without a pass through torch's dispatcher, which costs some
    microseconds of Python per tensor.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if is_transforming() or torch._C._get_tracing_state() is not None:
        return False
    return all(type(tensor) in _PLAIN and not tensor.is_meta for tensor in tensors)


def needs_no_dispatch(*tensors: Tensor) -> bool:
    """Return whether an op of these tensors may be a plain call: neither its gradient nor its graph is wanted.

    The first call of a ``torch.library.custom_op`` imports torch._dynamo, which takes a second or two.
    """
    return not is_differentiated(*tensors) and runs_at_once(*tensors)


def dispatched_if_needed(compute: Callable[..., R], op: Callable[..., R]) -> Callable[..., R]:
    """Return a function that calls ``compute`` if :func:`needs_no_dispatch` allows it, else ``op``, made from it."""

    def call(*args: Any) -> R:
        plain = needs_no_dispatch(*(x for x in args if isinstance(x, Tensor)))
        return compute(*args) if plain else op(*args)

    return call
