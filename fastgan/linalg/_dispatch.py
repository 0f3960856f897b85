"""Choice of implementation, and the autograd registration that the ops of :mod:`fastgan.linalg` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import backend

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


def by_products(operand: Tensor) -> bool:
    """Return whether gradients avoid eigenvectors, which are slow on a GPU."""
    return operand.is_cuda


def register_derivatives(op: Any, bwd: Any, bwd_bwd: Any, operands: int) -> None:
    """Register the first two derivatives of (value, report) = op(*operands, *options), and their fakes.

    Args:
        bwd: maps the value's gradient and the operands to the operands' gradients.
        bwd_bwd: maps cotangents of those, and the inputs of ``bwd``, to the gradients of these inputs.
    """

    def like(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        empty = tuple(x.new_empty(x.shape) for x in tensors)
        return empty if len(empty) > 1 else empty[0]

    def save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options = len(inputs) - operands
        ctx.save_for_backward(*inputs[:operands])
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = bwd(grad, *ctx.saved_tensors)
        return *(gradients if operands > 1 else (gradients,)), *[None] * ctx.options

    def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        return bwd_bwd(*cotangents, *ctx.saved_tensors)

    bwd.register_fake(lambda grad, *tensors: like(*tensors))
    bwd_bwd.register_fake(lambda *tensors: like(*tensors[operands:]))
    op.register_autograd(backward, setup_context=save_operands)
    bwd.register_autograd(backward_backward, setup_context=save_inputs)
