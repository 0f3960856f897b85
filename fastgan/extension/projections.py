"""The projections of an attention block by the C++ extension, on a CPU; half-precision weights compute in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._layout import image_like
from fastgan.backend import load_extension
from fastgan.reference.projections import gradients_of_projection

load_extension()
_pooled_projection = torch.ops.fastgan_C.pooled_projection.default
_unpool = torch.ops.fastgan_C.unpool.default
_projection_residual = torch.ops.fastgan_C.projection_residual.default


def pooled_projection_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, H W, d), kv (B, (H//2) (W//2), c) and int8 of kv's shape: which pixel of a window was largest."""
    (b, _, height, width), pooled_channels = x.shape, weight.shape[0] - d
    q = weight.new_empty(b, height * width, d)
    kv = weight.new_empty(b, (height // 2) * (width // 2), pooled_channels)
    index = torch.empty_like(kv, dtype=torch.int8)
    _pooled_projection(x, weight, bias, q, kv, index)
    return q, kv, index


def pooled_projection_bwd(
    grad_q: Tensor, grad_kv: Tensor, index: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (dx, dweight, dbias), which have no gradient of their own."""
    grad = weight.new_empty(*grad_q.shape[:2], weight.shape[0])
    _unpool(grad_q, grad_kv, index, x.shape[3], grad)
    return gradients_of_projection(grad, x, weight)


def projection_residual_fwd(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """rows (B, H W, e), weight (C, e), bias (C) or None, x (B, C, H, W) -> (B, C, H, W) in x's dtype and layout."""
    y = image_like(x)
    if x.stride() != y.stride():
        x = torch.empty_like(y).copy_(x)
    _projection_residual(rows, weight, bias, x, y)
    return y
