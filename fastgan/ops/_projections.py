"""The projections of an attention block, each in one pass over the feature map.

``pooled_projection`` gives queries, keys and values, the last two max-pooled. ``projection_residual`` adds the output
projection to x, which is read once and the sum written once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan._checks import check_alike, check_tensor
from fastgan._dispatch import differentiable, outside_autocast
from fastgan._layout import image_like, rows_of
from fastgan.backend import implementation, resolve
from fastgan.reference import projections as reference


def pooled_projection(
    x: Tensor, weight: Tensor, bias: Tensor | None, qk_channels: int, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """1x1 convolution of x whose outputs after the first ``qk_channels`` are 2x2 max-pooled.

    Args:
        x: feature map (B, C, H, W), H and W at least 2; float32, bfloat16 or float16 (float64 not by Triton),
            any memory format. Its dtype may differ from the weight's, as under autocast.
        weight: (qk_channels + c, C): theta over phi over g.
        bias: (qk_channels + c) in the weight's dtype, or None.
        qk_channels: d, the outputs that are not pooled.
        impl: "auto", "triton", "extension" or "reference".

    Returns:
        q (B, H W, d) and kv (B, (H//2) (W//2), c), in the weight's dtype. Gradients exist to every order.

    Raises:
        ValueError: rank, shape, dtype or device do not fit, or ``impl`` cannot be used here.

    Example:
        >>> x, weight = torch.randn(2, 8, 4, 4), torch.randn(6, 8)  # 2 channels of keys, 4 of values
        >>> keys, values = pooled_projection(x, weight, None, qk_channels=2)
        >>> keys.shape, values.shape
        (torch.Size([2, 16, 2]), torch.Size([2, 4, 4]))
    """
    check_tensor("x", x, ndim=4)
    check_tensor("weight", weight, ndim=2)
    return project_and_pool(x, weight, bias, qk_channels, resolve(impl, weight))


def project_and_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None, qk_channels: int, impl: str
) -> tuple[Tensor, Tensor]:
    """Compute :func:`pooled_projection` of tensors of the right rank by ``impl``, which is resolved."""
    if x.device != weight.device:
        raise ValueError(f"weight must be on the device of x ({x.device}), got {weight.device}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape (outputs, {x.shape[1]}), got {tuple(weight.shape)}")
    if not 0 < qk_channels < weight.shape[0]:
        raise ValueError(f"qk_channels must be between 1 and {weight.shape[0] - 1}, got {qk_channels}")
    if min(x.shape[2:]) < 2:
        raise ValueError(f"x must be at least 2 x 2 pixels, got shape {tuple(x.shape)}")
    _check_bias(bias, weight)
    q, kv, _ = _pooled_projection(x, weight, bias, qk_channels, impl)
    return q, kv


def projection_residual(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, impl: str = "auto") -> Tensor:
    """x + rows weight^T + bias, the rows taken as the pixels of a feature map.

    Args:
        rows: (B, H W, e); float32, bfloat16 or float16 (float64 not by Triton), any strides.
        weight: (C, e), dtype of rows.
        bias: (C), dtype of rows, or None.
        x: feature map (B, C, H, W), any memory format; its dtype may differ, as under autocast.
        impl: "auto", "triton", "extension" or "reference".

    Returns:
        (B, C, H, W) in x's dtype and memory format. Gradients exist to every order.

    Raises:
        ValueError: rank, shape, dtype or device do not fit, or ``impl`` cannot be used here.

    Example:
        >>> rows, weight, x = torch.randn(2, 16, 4), torch.randn(8, 4), torch.randn(2, 8, 4, 4)
        >>> projection_residual(rows, weight, None, x).shape
        torch.Size([2, 8, 4, 4])
    """
    check_tensor("rows", rows, ndim=3)
    check_tensor("weight", weight, ndim=2)
    check_tensor("x", x, ndim=4)
    return project_and_add(rows, weight, bias, x, resolve(impl, weight))


def project_and_add(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, impl: str) -> Tensor:
    """Compute :func:`projection_residual` of tensors of the right rank by ``impl``, which is resolved."""
    check_alike(rows=rows, weight=weight)
    if x.device != rows.device:
        raise ValueError(f"x must be on the device of rows ({rows.device}), got {x.device}")
    b, channels, height, width = x.shape
    if rows.shape[:2] != (b, height * width):
        raise ValueError(f"rows must have shape ({b}, {height * width}, e) for this x, got {tuple(rows.shape)}")
    if weight.shape != (channels, rows.shape[2]):
        raise ValueError(f"weight must have shape ({channels}, {rows.shape[2]}), got {tuple(weight.shape)}")
    _check_bias(bias, weight)
    return cast(Tensor, _projection_residual(rows, weight, bias, x, impl))


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must have shape ({weight.shape[0]},) and dtype {weight.dtype}, got {tuple(bias.shape)}")


@custom_op("fastgan::pooled_projection", mutates_args=())
@outside_autocast
def pooled_projection_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, d: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("projections", impl).pooled_projection_fwd(x, weight, bias, d)


@pooled_projection_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, d: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    b, _, height, width = x.shape
    q = weight.new_empty(b, height * width, d)
    kv = weight.new_empty(b, (height // 2) * (width // 2), weight.shape[0] - d)
    return q, kv, torch.empty_like(kv, dtype=torch.int8)


def _save_pooled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.impl = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, weight, output[2])


def _pooled_backward(ctx: Any, grad_q: Tensor, grad_kv: Tensor, _grad_index: Tensor | None) -> tuple[Any, ...]:
    x, weight, index = ctx.saved_tensors
    if ctx.impl != "extension":
        dx, dweight, dbias = reference.pooled_projection_bwd(grad_q, grad_kv, index, x, weight)
    else:
        grad = _unpool(grad_q, grad_kv, index, x.shape[3])
        if x.dtype == grad.dtype:
            drows, dweight = _projection_gradients(grad, rows_of(x), weight)
            dx, dbias = drows.mT.unflatten(2, x.shape[2:]), grad.sum(dim=(0, 1))
        else:
            dx, dweight, dbias = reference.gradients_of_projection(grad, x, weight)
    return dx, dweight, dbias if ctx.has_bias else None, None, None


# The gradient of pooled_projection is `unpool`, then the products of the projection. `unpool` and `gather_pooled` are
# linear maps that are each other's gradient.
@custom_op("fastgan::unpool", mutates_args=())
def unpool_op(grad_q: Tensor, grad_kv: Tensor, index: Tensor, width: int) -> Tensor:
    return implementation("projections", "extension").unpool(grad_q, grad_kv, index, width)


@unpool_op.register_fake
def _(grad_q: Tensor, grad_kv: Tensor, index: Tensor, width: int) -> Tensor:
    return grad_q.new_empty(*grad_q.shape[:2], grad_q.shape[2] + grad_kv.shape[2])


@custom_op("fastgan::gather_pooled", mutates_args=())
def gather_pooled_op(grad: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return implementation("projections", "extension").gather_pooled(grad, index, width)


@gather_pooled_op.register_fake
def _(grad: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(*grad.shape[:2], grad.shape[2] - index.shape[2]), grad.new_empty(index.shape)


@custom_op("fastgan::projection_gradients", mutates_args=())
def projection_gradients_op(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return implementation("projections", "extension").projection_gradients(grad, rows, weight)


@projection_gradients_op.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight)


def _save_gradients(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gradients_backward(ctx: Any, grad_rows: Tensor | None, grad_weight: Tensor | None) -> tuple[Any, ...]:
    """Differentiate drows = grad weight and dweight = grad^T rows; either may have no cotangent."""
    grad, rows, weight = ctx.saved_tensors
    if grad_rows is None and grad_weight is None:
        return None, None, None
    if grad_weight is None:
        return grad_rows @ weight.mT, None, (grad.mT @ grad_rows).sum(dim=0)
    if grad_rows is None:
        return rows @ grad_weight.mT, grad @ grad_weight, None
    d_rows, d_weight = _projection_gradients(grad, grad_rows, grad_weight)
    return grad_rows @ weight.mT + rows @ grad_weight.mT, d_rows, d_weight


def _save_unpool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, index, ctx.width = inputs
    ctx.save_for_backward(index)


def _unpool_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_gather_pooled(grad, *ctx.saved_tensors, ctx.width), None, None)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, index, ctx.width = inputs
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, grad_q: Tensor, grad_kv: Tensor) -> tuple[Any, ...]:
    return _unpool(grad_q, grad_kv, *ctx.saved_tensors, ctx.width), None, None


_projection_gradients = differentiable(projection_gradients_op, _gradients_backward, _save_gradients)
_unpool = differentiable(unpool_op, _unpool_backward, _save_unpool)
_gather_pooled = differentiable(gather_pooled_op, _gather_backward, _save_gather)


@custom_op("fastgan::projection_residual", mutates_args=())
@outside_autocast
def projection_residual_op(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, impl: str) -> Tensor:
    return implementation("projections", impl).projection_residual_fwd(rows, weight, bias, x)


@projection_residual_op.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, impl: str) -> Tensor:
    return image_like(x)


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, bias, _, ctx.impl = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(rows, weight)


def _residual_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, weight = ctx.saved_tensors
    if ctx.impl == "extension":
        grad_rows = rows_of(grad.to(weight.dtype))
        drows, dweight = _projection_gradients(grad_rows, rows, weight)
        dbias = grad_rows.sum(dim=(0, 1))
    else:
        drows, dweight, dbias = reference.projection_residual_bwd(grad, rows, weight)
    return drows, dweight, dbias if ctx.has_bias else None, grad, None


_pooled_projection = differentiable(pooled_projection_op, _pooled_backward, _save_pooled)
_projection_residual = differentiable(projection_residual_op, _residual_backward, _save_residual)
