"""1x1 convolution of a feature map to queries, keys and values, the last two max-pooled, in plain PyTorch.

The gradient is made of differentiable PyTorch functions for the kernel too: it is exact to every order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan._layout import is_channels_first, rows_of


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
    """Gradients (dx, dweight, dbias)."""
    grad = torch.cat((grad_q, _unpooled(grad_kv, index, x.shape[2], x.shape[3])), dim=2)  # (B, N, d + c)
    rows = rows_of(x)
    if is_channels_first(rows):
        dx = (weight.mT @ grad.mT).unflatten(2, x.shape[2:])
    else:
        dx = (grad @ weight).mT.unflatten(2, x.shape[2:])
    dweight = (grad.mT @ rows.to(grad.dtype)).sum(dim=0)
    return dx.to(x.dtype), dweight, grad.sum(dim=(0, 1))


def _unpooled(grad: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    """(B, M, c) -> (B, N, c): each entry at the pixel of its window that was largest."""
    b, _, c = grad.shape
    windows = (b, height // 2, 1, width // 2, 1, c)
    corners = torch.arange(4, dtype=index.dtype, device=index.device).view(2, 1, 2, 1)
    full = torch.where(index.view(windows) == corners, grad.reshape(windows), 0)
    full = full.reshape(b, height // 2 * 2, width // 2 * 2, c)
    return F.pad(full, (0, 0, 0, width % 2, 0, height % 2)).reshape(b, height * width, c)
