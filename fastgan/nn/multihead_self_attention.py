"""Self-attention of several heads over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.ops import attention, squared_distance_attention

LOGITS = ("product", "cosine", "distance")


class MultiheadSelfAttention(nn.Module):
    """Self-attention whose gradients of gradients take O(tokens) memory, with a choice of logits.

    Args:
        channels: C, a multiple of ``num_heads``; heads have d = C / num_heads channels.
        num_heads: number of heads.
        logits: "product", q k / sqrt(d); "cosine", the cosine of q and k times a learned factor per head; or
            "distance", -|q - k|^2 / sqrt(d) with q = k, which is Lipschitz on bounded inputs (ViTGAN, GigaGAN).
        sinks: one learned logit per head that takes part in the softmax and has no value, so that a head may attend to
            nothing. Not with "distance".
        bias: biases of both projections.
        impl: as in :func:`fastgan.ops.attention`.

    Shape:
        x (n, tokens, C) -> (n, tokens, C), any layout.

    Source: Vaswani et al. 2017, arXiv 1706.03762. Cosines: Liu et al. 2022 (Swin V2), arXiv 2111.09883. Distances: Kim
    et al. 2021, arXiv 2006.04710. Sinks: Xiao et al. 2024, arXiv 2309.17453.

    Example:
        >>> layer = MultiheadSelfAttention(32, 4, logits="cosine", sinks=True)
        >>> layer(torch.randn(2, 64, 32)).shape
        torch.Size([2, 64, 32])
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        logits: str = "product",
        sinks: bool = False,
        bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or channels < 1 or channels % num_heads:
            raise ValueError(f"channels must be a positive multiple of num_heads, got {channels} for {num_heads} heads")
        if logits not in LOGITS:
            raise ValueError(f"logits must be one of {', '.join(map(repr, LOGITS))}, got {logits!r}")
        if sinks and logits == "distance":
            raise ValueError("sinks must be False for logits='distance'")
        self.num_heads, self.logits, self.impl = num_heads, logits, impl
        self.qkv = nn.Linear(channels, (2 if logits == "distance" else 3) * channels, bias=bias)
        self.out = nn.Linear(channels, channels, bias=bias)
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        # Swin V2's first factor, 10; its logarithm is learned.
        self.log_factor = nn.Parameter(torch.full((num_heads, 1, 1), 10.0).log()) if logits == "cosine" else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens."""
        if x.ndim != 3 or x.shape[2] != self.out.in_features:
            raise ValueError(f"x must have shape (n, tokens, {self.out.in_features}), got {tuple(x.shape)}")
        projected = self.qkv(x).unflatten(2, (-1, self.num_heads, x.shape[2] // self.num_heads))
        parts = projected.permute(2, 0, 3, 1, 4).unbind()  # each (n, heads, tokens, d)
        scale = parts[0].shape[3] ** -0.5
        if self.logits == "distance":
            q, v = parts
            o = squared_distance_attention(q, q, v, scale, self.impl)
        else:
            q, k, v = parts
            if self.log_factor is not None:
                factor = self.log_factor.exp().to(q.dtype)
                q, k, scale = (factor * F.normalize(q, dim=-1)).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), 1.0
            o = attention(q, k, v, scale, self.impl, sinks=self.sinks)
        return self.out(o.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        sinks = self.sinks is not None
        return f"{self.out.in_features}, num_heads={self.num_heads}, logits={self.logits!r}, sinks={sinks}"


class TokenAttention2d(nn.Module):
    """Residual multi-head attention over the pixels of a map: y = x + gamma * attention(x), gamma = 0 at the start.

    With its defaults, cosines and sinks, it is like the attention of R3GAN's successors.

    Args:
        in_channels: C, a multiple of ``num_heads``.
        num_heads, logits, sinks, impl: as in :class:`MultiheadSelfAttention`.

    Shape:
        x (n, C, H, W) -> (n, C, H, W).

    Example:
        >>> TokenAttention2d(32, 4)(torch.randn(2, 32, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self, in_channels: int, num_heads: int, *, logits: str = "cosine", sinks: bool = True, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.attention = MultiheadSelfAttention(in_channels, num_heads, logits=logits, sinks=sinks, impl=impl)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        tokens = self.attention(x.flatten(2).transpose(1, 2))
        return x + self.gamma * tokens.transpose(1, 2).unflatten(2, x.shape[2:])
