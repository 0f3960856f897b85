"""Memory layouts of outputs: ops answer in the layout of their input, so that no copy is needed around them."""

from __future__ import annotations

from torch import Tensor


def empty_rows_like(x: Tensor, channels: int) -> Tensor:
    """An uninitialised (B, N, channels) tensor for x (B, N, d), channels-first in memory where x is."""
    b, n, _ = x.shape
    if is_channels_first(x):
        return x.new_empty(b, channels, n).transpose(1, 2)
    return x.new_empty(b, n, channels)


def is_channels_first(x: Tensor) -> bool:
    """True where the rows of x (B, N, d) lie next to one another in memory, channel by channel."""
    return x.stride(1) == 1 and x.stride(2) != 1
