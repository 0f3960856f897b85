"""The projections of an attention block by the C++ extension, on a CPU; half-precision weights compute in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._layout import image_like
from fastgan.backend import load_extension

load_extension()
_pooled_projection = torch.ops.fastgan_C.pooled_projection.default
_unpool = torch.ops.fastgan_C.unpool.default
_projection_gradients = torch.ops.fastgan_C.projection_gradients.default
_gather_pooled = torch.ops.fastgan_C.gather_pooled.default
_attention_block = torch.ops.fastgan_C.attention_block.default
_projection_residual = torch.ops.fastgan_C.projection_residual.default


def pooled_projection_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, H W, d), kv (B, (H//2) (W//2), c) and int8 of kv's shape: which pixel of a window was largest."""
    (b, _, height, width), pooled_channels = x.shape, weight.shape[0] - d
    q = weight.new_empty(b, height * width, d)
    kv = weight.new_empty(b, (height // 2) * (width // 2), pooled_channels)
    index = torch.empty_like(kv, dtype=torch.int8)
    _pooled_projection(x, weight, bias, q, kv, index)
    return q, kv, index


def projection_gradients(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (drows, dweight) of rows weight^T for its gradient (B, P, outputs), rows (B, P, C), all of one dtype."""
    drows, dweight = torch.empty_like(rows), torch.empty_like(weight)
    if grad.numel() == 0:
        return drows, dweight.zero_()
    _projection_gradients(grad, rows, weight, drows, dweight)
    return drows, dweight


def unpool(grad_q: Tensor, grad_kv: Tensor, index: Tensor, width: int) -> Tensor:
    """Return the gradient (B, H W, d + c) of the outputs before pooling; images are ``width`` pixels wide."""
    grad = grad_q.new_empty(*grad_q.shape[:2], grad_q.shape[2] + grad_kv.shape[2])
    _unpool(grad_q, grad_kv, index, width, grad)
    return grad


def gather_pooled(grad: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return (B, H W, d) and (B, (H//2) (W//2), c) of (B, H W, d + c), the transpose of :func:`unpool`."""
    q = grad.new_empty(*grad.shape[:2], grad.shape[2] - index.shape[2])
    kv = grad.new_empty(index.shape)
    _gather_pooled(grad, index, width, q, kv)
    return q, kv


def projection_residual_fwd(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """rows (B, H W, e), weight (C, e), bias (C) or None, x (B, C, H, W) -> (B, C, H, W) in x's dtype and layout."""
    y = image_like(x)
    if x.stride() != y.stride():
        x = torch.empty_like(y).copy_(x)
    _projection_residual(rows, weight, bias, x, y)
    return y


def attention_block(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: int,
    out_weight: Tensor,
    out_bias: Tensor | None,
    x: Tensor,
    scale: float,
) -> Tensor:
    """Return x + its projection of attention, a whole block at once, without gradients.

    h and x (B, C, H, W), weight (2 d + e, C), out_weight (C, e), scale > 0 -> (B, C, H, W) in x's dtype and layout.
    """
    result: Tensor = _attention_block(h, weight, bias, d, out_weight, out_bias, x, scale)
    return result
