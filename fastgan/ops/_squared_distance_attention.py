"""Attention by squared distances, composed of the op for products."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops._attention import attention


def squared_distance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    impl: str = "auto",
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(-scale |q - k|^2) v, twice differentiable in O(N) memory as :func:`attention` is.

    Unlike attention by products it can be Lipschitz: if q and k are the same linear map of x and v another. ViTGAN's
    and GigaGAN's discriminators are made of it.

    It is :func:`attention` of one more channel: -|q - k|^2 = 2 q k - |k|^2 - |q|^2, of which the softmax does not see
    the last. That channel counts: tiles have 16, 32, 64 or 128 channels, so 63 channels of q are quicker than 64.
    ``sinks`` stand beside 2 q k - |k|^2 scaled, hence beside the logits plus ``scale`` |q|^2.

    Args, returns, raises: as :func:`attention`, with at most 127 channels of q for the kernels.

    Source: Kim et al. 2021, "The Lipschitz Constant of Self-Attention", arXiv 2006.04710.

    Example:
        >>> q, k, v = (torch.randn(2, 4, 9, 7) for _ in range(3))
        >>> expected = torch.softmax(-torch.cdist(q, k).square(), dim=-1) @ v
        >>> torch.dist(squared_distance_attention(q, k, v), expected) < 1e-4
        tensor(True)
    """
    q = torch.cat([2 * q, torch.ones_like(q[..., :1])], dim=-1)
    k = torch.cat([k, -k.square().sum(-1, keepdim=True)], dim=-1)
    return attention(q, k, v, scale, impl, is_causal=is_causal, mask=mask, sinks=sinks)
