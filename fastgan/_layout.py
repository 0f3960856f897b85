"""Memory layouts of outputs: ops keep the layout of their input, so no copy is needed around them."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_rows_like(x: Tensor, channels: int) -> Tensor:
    """Return an uninitialized (B, N, channels) tensor for x (B, N, d), channels-first in memory if x is.

    For x (B, H, N, d) it is (B, H, N, channels), with heads next to one another in each row of memory if x has them so.
    """
    if x.ndim == 4:
        b, h, n, _ = x.shape
        if h > 1 and x.stride(1) < x.stride(2):
            return x.new_empty(b, n, h, channels).transpose(1, 2)
        return x.new_empty(b, h, n, channels)
    b, n, _ = x.shape
    if is_channels_first(x):
        return x.new_empty(b, channels, n).transpose(1, 2)
    return x.new_empty(b, n, channels)


def is_channels_first(x: Tensor) -> bool:
    """Return whether the N entries of each channel of x (B, N, d) are contiguous in memory."""
    return x.stride(1) == 1 and x.stride(2) != 1


def rows_of(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) as (B, H W, C): a view if each row of the image follows the one above it in memory."""
    return x.flatten(2).transpose(1, 2)


def image_like(x: Tensor) -> Tensor:
    """Return an uninitialized tensor like x (B, C, H, W): channels-last in memory if x is, else channels-first."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
