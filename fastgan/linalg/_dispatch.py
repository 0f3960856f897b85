"""Choice of implementation, and the autograd registration that the ops of :mod:`fastgan.linalg` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgan import backend
from fastgan._dispatch import differentiable
from fastgan.linalg._transforms import Derivatives, third_derivative, transform_is_active

IMPLS = ("auto", "extension", "reference")


def resolve(impl: str, device: torch.device) -> str:
    """Turn ``impl`` into ``"extension"`` or ``"reference"`` for operands on ``device``.

    Raises:
        ValueError: ``impl`` is ``"extension"`` and that half of it is missing.
    """
    supported = device.type in ("cpu", "cuda")
    if impl == "reference" or (impl == "auto" and not supported):
        return "reference"
    if supported and backend.extension_available(device.type):
        return "extension"
    if impl == "extension":
        reason = backend.extension_missing(device.type) if supported else f"it has no half for {device.type} tensors"
        raise ValueError(f"impl='extension' cannot be used: {reason}")
    return "reference"


def watched() -> bool:
    """Return whether values cannot be read: while torch.compile traces, and within a CUDA graph."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def nan_unless(right: Tensor, matrices: Tensor) -> Tensor:
    """Return ``matrices`` (..., rows, cols) with NaN in those that are not ``right`` (...), without reading a value.

    A product, so that their gradients are NaN too.
    """
    return matrices * torch.where(right, 1.0, torch.nan).to(matrices.dtype)[..., None, None]


def by_products(operand: Tensor) -> bool:
    """Return whether gradients avoid eigenvectors, which are slow on a GPU."""
    return operand.is_cuda


def callable_anywhere(op: Callable[..., Any], transformed: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``op``, or ``transformed`` under transforms of ``torch.func`` and forward mode.

    Args:
        op: what :func:`fastgan._dispatch.differentiable` made of an op.
        transformed: the op within a ``torch.autograd.Function`` that has a rule for each transform.
    """

    def call(*args: Any) -> Any:
        return transformed(*args) if transform_is_active() else op(*args)

    return call


def register_derivatives(op: Any, bwd: Any, bwd_bwd: Any, operands: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register the first two derivatives of (value, report) = op(*operands, *options), and their fakes.

    Args:
        bwd: maps the value's gradient and the operands to the operands' gradients.
        bwd_bwd: maps cotangents of those, and the inputs of ``bwd``, to the gradients of these inputs.

    Returns:
        The op as a function that can be called under every transform.
    """
    derivatives = Derivatives(op, bwd, bwd_bwd, operands)

    def like(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        empty = tuple(x.new_empty(x.shape) for x in tensors)
        return empty if len(empty) > 1 else empty[0]

    def save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options = len(inputs) - operands
        ctx.save_for_backward(*inputs[:operands])
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        first = derivatives.gradients if transform_is_active() else call_bwd
        gradients = first(grad, *ctx.saved_tensors)
        return *(gradients if isinstance(gradients, tuple) else (gradients,)), *[None] * ctx.options

    def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        second = derivatives.second if transform_is_active() else call_bwd_bwd
        return second(*cotangents, *ctx.saved_tensors)

    def third(ctx: Any, *cotangents: Tensor) -> None:
        raise third_derivative(op)

    bwd.register_fake(lambda grad, *tensors: like(*tensors))
    bwd_bwd.register_fake(lambda *tensors: like(*tensors[operands:]))
    call_bwd_bwd = differentiable(bwd_bwd, third)
    call_bwd = differentiable(bwd, backward_backward, save_inputs)
    return callable_anywhere(differentiable(op, backward, save_operands), derivatives.call)
