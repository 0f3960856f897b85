"""Queries, keys and values of a feature map, the last two max-pooled, in one pass over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan._checks import check_tensor
from fastgan.backend import check_impl, implementation, resolve
from fastgan.ops._dispatch import outside_autocast
from fastgan.reference.pooled_projection import pooled_projection_bwd


def pooled_projection(
    x: Tensor, weight: Tensor, bias: Tensor | None, qk_channels: int, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """1x1 convolution of x, of which all outputs but the first ``qk_channels`` are 2x2 max-pooled.

    Args:
        x: feature map (B, C, H, W), H and W at least 2; float32, bfloat16 or float16 (float64 on the reference path),
            any memory format. Its dtype may differ from the weight's, as under autocast.
        weight: (qk_channels + c, C): theta over phi over g.
        bias: (qk_channels + c) in the weight's dtype, or None.
        qk_channels: d, the outputs that are not pooled.
        impl: "auto", "triton" or "reference".

    Returns:
        q (B, H W, d) and kv (B, (H//2) (W//2), c), in the weight's dtype. Gradients exist to every order.

    Raises:
        ValueError: rank, shape, dtype or device do not fit, or ``impl`` cannot be used here.
    """
    check_tensor("x", x, ndim=4)
    check_tensor("weight", weight, ndim=2)
    check_impl(impl)
    resolve(impl, weight)
    if x.device != weight.device:
        raise ValueError(f"weight must be on the device of x ({x.device}), got {weight.device}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape (outputs, {x.shape[1]}), got {tuple(weight.shape)}")
    if not 0 < qk_channels < weight.shape[0]:
        raise ValueError(f"qk_channels must be between 1 and {weight.shape[0] - 1}, got {qk_channels}")
    if min(x.shape[2:]) < 2:
        raise ValueError(f"x must be at least 2 x 2 pixels, got shape {tuple(x.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must have shape ({weight.shape[0]},) and dtype {weight.dtype}, got {tuple(bias.shape)}")
    q, kv, _ = pooled_projection_op(x, weight, bias, qk_channels, impl)
    return q, kv


@custom_op("fastgan::pooled_projection", mutates_args=())
@outside_autocast
def pooled_projection_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, d: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("pooled_projection", impl, weight).pooled_projection_fwd(x, weight, bias, d)


@pooled_projection_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, d: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    b, _, height, width = x.shape
    q = weight.new_empty(b, height * width, d)
    kv = weight.new_empty(b, (height // 2) * (width // 2), weight.shape[0] - d)
    return q, kv, torch.empty_like(kv, dtype=torch.int8)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, weight, output[2])


def _backward(ctx: Any, grad_q: Tensor, grad_kv: Tensor, _grad_index: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, index = ctx.saved_tensors
    dx, dweight, dbias = pooled_projection_bwd(grad_q, grad_kv, index, x, weight)
    return dx, dweight, dbias if ctx.has_bias else None, None, None


pooled_projection_op.register_autograd(_backward, setup_context=_save)
