"""The projections of an attention block in plain PyTorch: queries, keys and values; the output with its residual.

The gradients are made of differentiable PyTorch functions, and serve the kernels too: they are exact to every order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan._layout import image_like, is_channels_first, rows_of


def pooled_projection_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, H W, d), kv (B, (H//2) (W//2), c) and int8 of kv's shape: which pixel of a 2x2 window was largest.

    x (B, C, H, W), weight (d + c, C), bias (d + c) or None; q and kv have the weight's dtype.
    """
    y = F.conv2d(x.to(weight.dtype), weight[:, :, None, None], bias)
    pooled, flat = F.max_pool2d(y[:, d:], 2, return_indices=True)
    width = x.shape[3]
    index = (flat // width % 2 * 2 + flat % width % 2).to(torch.int8)
    return tuple(t.flatten(2).mT.contiguous() for t in (y[:, :d], pooled, index))  # type: ignore[return-value]


def pooled_projection_bwd(
    grad_q: Tensor, grad_kv: Tensor, index: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (dx, dweight, dbias)."""
    (b, _, height, width), c = x.shape, grad_kv.shape[2]
    # Each pooled gradient goes to the pixel of its window that was largest.
    windows = (b, height // 2, 1, width // 2, 1, c)
    corners = torch.arange(4, dtype=index.dtype, device=index.device).view(2, 1, 2, 1)
    full = torch.where(index.view(windows) == corners, grad_kv.reshape(windows), 0)
    full = full.reshape(b, height // 2 * 2, width // 2 * 2, c)
    full = F.pad(full, (0, 0, 0, width % 2, 0, height % 2)).reshape(b, height * width, c)
    grad = torch.cat((grad_q, full), dim=2)  # (B, N, d + c)
    return gradients_of_projection(grad, x, weight)


def gradients_of_projection(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias) of the rows x weight^T + bias for their gradients ``grad`` (B, H W, outputs)."""
    rows = rows_of(x)
    if is_channels_first(rows):
        dx = (weight.mT @ grad.mT).unflatten(2, x.shape[2:])
    else:
        dx = (grad @ weight).mT.unflatten(2, x.shape[2:])
    dweight = (grad.mT @ rows.to(grad.dtype)).sum(dim=0)
    return dx.to(x.dtype), dweight, grad.sum(dim=(0, 1))


def projection_residual_fwd(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """rows (B, H W, e), weight (C, e), bias (C) or None, x (B, C, H, W) -> (B, C, H, W) in x's dtype and layout."""
    projected = rows @ weight.mT
    if bias is not None:
        projected = projected + bias
    y = image_like(x)
    return y.copy_(x + projected.mT.unflatten(2, x.shape[2:]))


def projection_residual_bwd(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (drows, dweight, dbias) for ``grad`` (B, C, H, W); that of x is ``grad`` itself."""
    grad_rows = rows_of(grad.to(weight.dtype))
    return grad_rows @ weight, (grad_rows.mT @ rows).sum(dim=0), grad_rows.sum(dim=(0, 1))
