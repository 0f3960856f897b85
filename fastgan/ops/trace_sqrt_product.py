"""``fastgan::trace_sqrt_product``: schema, dispatch (C++ extension, or plain PyTorch) and autograd to second order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan import _extension
from fastgan.reference import trace_sqrt_product as reference

IMPLS = ("auto", "extension", "reference")


def resolve(impl: str, device: torch.device) -> str:
    """Turn ``impl`` into ``"extension"`` or ``"reference"`` for operands on ``device``.

    Raises:
        ValueError: ``impl`` is ``"extension"`` where that half of it is missing.
    """
    supported = device.type in ("cpu", "cuda")
    if impl == "reference" or (impl == "auto" and not supported):
        return "reference"
    if supported and _extension.available(device.type):
        return "extension"
    if impl == "extension":
        reasons = {row.name: row.detail for row in _extension.status()}
        reason = reasons.get(f"extension {device.type}", f"it has no half for {device.type} tensors")
        raise ValueError(f"impl='extension' cannot be used: {reason}")
    return "reference"


@custom_op("fastgan::trace_sqrt_product", mutates_args=())
def trace_sqrt_product(a: Tensor, b: Tensor, method: str, impl: str) -> tuple[Tensor, Tensor]:
    """tr((A B)^{1/2}) of (..., d, d) matrices, and (error bound, method code), float64, in a last dimension of 2."""
    shape = _batch_shape(a, b)
    matrices_a, matrices_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    pairs = torch.stack([_indices(a, shape), _indices(b, shape)], 1)
    if len(matrices_b) < len(matrices_a):  # the first operand is factored: let that be the one with fewer matrices
        matrices_a, matrices_b, pairs = matrices_b, matrices_a, pairs.flip(1)
    extension = resolve(impl, a.device) == "extension"
    compute = torch.ops.fastgan_C.trace_sqrt_product if extension else reference.trace_sqrt_product
    rows = compute(matrices_a, matrices_b, pairs.contiguous(), reference.METHODS[method]).to(a.device)
    # An operator may not return two views of one tensor.
    return rows[:, 0].to(a.dtype, copy=True).reshape(shape), rows[:, 1:].clone().reshape(*shape, 2)


def _batch_shape(a: Tensor, b: Tensor) -> torch.Size:
    return torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])


def _indices(operand: Tensor, shape: torch.Size) -> Tensor:
    """For each pair of the broadcast batch, which matrix of ``operand`` it holds."""
    batch = operand.shape[:-2]
    return torch.arange(batch.numel()).reshape(batch).expand(shape).reshape(-1)


@trace_sqrt_product.register_fake
def _(a: Tensor, b: Tensor, method: str, impl: str) -> tuple[Tensor, Tensor]:
    shape = _batch_shape(a, b)
    return a.new_empty(shape), a.new_empty((*shape, 2), dtype=torch.float64)


@custom_op("fastgan::trace_sqrt_product_bwd", mutates_args=())
def trace_sqrt_product_bwd(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return reference.trace_sqrt_product_bwd(grad, a, b)


@trace_sqrt_product_bwd.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


@custom_op("fastgan::trace_sqrt_product_bwd_bwd", mutates_args=())
def trace_sqrt_product_bwd_bwd(
    cotangent_a: Tensor, cotangent_b: Tensor, grad: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.trace_sqrt_product_bwd_bwd(cotangent_a, cotangent_b, grad, a, b)


@trace_sqrt_product_bwd_bwd.register_fake
def _(cotangent_a: Tensor, cotangent_b: Tensor, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(grad.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, _, _ = inputs
    ctx.save_for_backward(a, b)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *trace_sqrt_product_bwd(grad, *ctx.saved_tensors), None, None


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward_backward(ctx: Any, cotangent_a: Tensor, cotangent_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return trace_sqrt_product_bwd_bwd(cotangent_a, cotangent_b, *ctx.saved_tensors)


trace_sqrt_product.register_autograd(_backward, setup_context=_save_operands)
trace_sqrt_product_bwd.register_autograd(_backward_backward, setup_context=_save_inputs)


def asymmetry(matrices: Tensor) -> Tensor:
    """Largest magnitudes of A - A^T and of A for ``matrices`` (n, d, d), as (n, 2); not finite where A is not."""
    if not matrices.is_cuda and _extension.available("cpu"):
        return torch.ops.fastgan_C.asymmetry(matrices)
    return reference.asymmetry(matrices)
