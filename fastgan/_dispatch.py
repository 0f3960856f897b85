"""Calling ops: the dtypes that autocast asks for, and when an op's body may be called past torch's dispatcher."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

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
        context = no_autocast(first if isinstance(first, Tensor) else first[0])
        if type(context) is nullcontext:
            return function(*args)
        with context:
            return function(*args)

    # An op's schema is read from these types, which the names of this module would not resolve.
    body.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return body  # type: ignore[return-value]


def is_differentiated(*tensors: Tensor) -> bool:
    """Return whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_transforming() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is active.

    Ops of ``torch.library`` refuse the former's gradients, and drop tangents in silence.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Return whether ``torch.export``, ``torch.onnx.export`` or ``torch.jit.trace`` is recording.

    The graph may be run without fastgan, so it must consist of torch's own operators.
    """
    if torch.compiler.is_compiling():
        # torch.compiler.is_exporting() returns this flag, but torch 2.11's dynamo takes it to be True in any graph.
        return bool(torch.compiler._is_exporting_flag)
    return torch._C._get_tracing_state() is not None


def runs_at_once(*tensors: Tensor) -> bool:
    """Return whether nothing stands between a call and these tensors' memory: no trace, transform, mode or subclass.

    If so, operations that need no gradient can bypass torch's dispatcher, which costs some microseconds of Python per
    tensor.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
        return False
    return all(type(tensor) in _PLAIN and not tensor.is_meta for tensor in tensors)


def needs_no_dispatch(*tensors: Tensor) -> bool:
    """Return whether an op of these tensors may be a plain call: neither its gradient nor its graph is wanted.

    The first call of a ``torch.library.custom_op`` imports torch._dynamo, which takes a second or two.
    """
    return not is_differentiated(*tensors) and runs_at_once(*tensors)


def differentiable(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Register the gradient of a ``custom_op``, and return the op as a function of positional arguments.

    If :func:`runs_at_once` allows it, the function calls the op's body: alone if no gradient is wanted, else in an
    ``autograd.Function`` of the same gradient, which costs half the Python of a pass through torch.library. Else it
    calls the op.
    """
    op.register_autograd(backward, setup_context=setup_context)
    schema, body = op._opoverload._schema, op._init_fn
    types = [str(argument.type) for argument in schema.arguments]
    takes_list = [type == "List[Tensor]" for type in types]
    takes_lists = any(takes_list)
    tensor_positions = [i for i, type in enumerate(types) if type in ("Tensor", "Optional[Tensor]")]
    returns_list = str(schema.returns[0].type) == "List[Tensor]"

    # Autograd must see the entries of lists one by one; they come after the lengths of the lists.
    def direct(ctx: Any, lengths: list[int], *flat: Any) -> Any:
        args: Sequence[Any] = flat
        if takes_lists:
            entries, remaining = iter(flat), iter(lengths)
            args = [
                list(itertools.islice(entries, next(remaining))) if is_list else next(entries) for is_list in takes_list
            ]
        output = body(*args)
        ctx.lengths = lengths
        if setup_context is not None:
            setup_context(ctx, tuple(args), output)
        return tuple(output) if returns_list else output

    def direct_backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        given = backward(ctx, list(grads)) if returns_list else backward(ctx, *grads)
        if not takes_lists:
            return (None, given) if isinstance(given, Tensor) else (None, *given)
        flat, remaining = [None], iter(ctx.lengths)
        for is_list, grad in zip(takes_list, given, strict=True):
            length = next(remaining) if is_list else 1
            flat += grad if is_list and grad is not None else [grad] * length
        return tuple(flat)

    name = op._qualname.replace("::", "_")  # grad_fn shows it
    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(direct), "backward": staticmethod(direct_backward)},
    )

    def call(*args: Any) -> Any:
        tensors = [args[i] for i in tensor_positions if args[i] is not None]
        if takes_lists:
            tensors += [x for is_list, arg in zip(takes_list, args, strict=True) if is_list for x in arg]
        if not runs_at_once(*tensors):
            return op(*args)
        if not is_differentiated(*tensors):
            return body(*args)
        if not takes_lists:
            output = function.apply([], *args)
        else:
            flat: list[Any] = []
            lengths: list[int] = []
            for is_list, arg in zip(takes_list, args, strict=True):
                if is_list:
                    lengths.append(len(arg))
                    flat += arg
                else:
                    flat.append(arg)
            output = function.apply(lengths, *flat)
        return list(output) if returns_list else output

    return call
