"""The output projection of an attention block with its residual: x is read once and the sum written once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import custom_op

from fastgan._checks import check_alike, check_tensor
from fastgan._layout import image_like
from fastgan.backend import check_impl, implementation, resolve
from fastgan.ops._dispatch import outside_autocast
from fastgan.reference.projections import projection_residual_bwd


def projection_residual(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, impl: str = "auto") -> Tensor:
    """x + rows weight^T + bias, the rows taken as the pixels of a feature map.

    Args:
        rows: (B, H W, e); float32, bfloat16 or float16 (float64 on the reference path), any strides.
        weight: (C, e), dtype of rows.
        bias: (C), dtype of rows, or None.
        x: feature map (B, C, H, W), any memory format; its dtype may differ, as under autocast.
        impl: "auto", "triton" or "reference".

    Returns:
        (B, C, H, W) in x's dtype and memory format. Gradients exist to every order.

    Raises:
        ValueError: rank, shape, dtype or device do not fit, or ``impl`` cannot be used here.
    """
    check_tensor("rows", rows, ndim=3)
    check_tensor("weight", weight, ndim=2)
    check_tensor("x", x, ndim=4)
    check_impl(impl)
    resolve(impl, weight)
    check_alike(rows=rows, weight=weight)
    if x.device != rows.device:
        raise ValueError(f"x must be on the device of rows ({rows.device}), got {x.device}")
    b, channels, height, width = x.shape
    if rows.shape[:2] != (b, height * width):
        raise ValueError(f"rows must have shape ({b}, {height * width}, e) for this x, got {tuple(rows.shape)}")
    if weight.shape != (channels, rows.shape[2]):
        raise ValueError(f"weight must have shape ({channels}, {rows.shape[2]}), got {tuple(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must have shape ({channels},) and dtype {weight.dtype}, got {tuple(bias.shape)}")
    return projection_residual_op(rows, weight, bias, x, impl)


@custom_op("fastgan::projection_residual", mutates_args=())
@outside_autocast
def projection_residual_op(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, impl: str) -> Tensor:
    return implementation("projections", impl, weight).projection_residual_fwd(rows, weight, bias, x)


@projection_residual_op.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, impl: str) -> Tensor:
    return image_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, bias, _, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(rows, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    drows, dweight, dbias = projection_residual_bwd(grad, *ctx.saved_tensors)
    return drows, dweight, dbias if ctx.has_bias else None, grad, None


projection_residual_op.register_autograd(_backward, setup_context=_save)
