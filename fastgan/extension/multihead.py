"""Attention of several heads by the C++ extension, on a CPU: all heads in the same passes.

The signatures are those of ``fastgan.reference.multihead``, which computes what the extension does not take: masks,
sinks, causal attention and grouped queries.
"""

from __future__ import annotations

from torch import Tensor

from fastgan.extension import attention
from fastgan.extension.attention import empty_stats
from fastgan.reference import multihead as reference

__all__ = ["empty_stats", "multihead_bwd", "multihead_bwd_bwd", "multihead_fwd", "takes"]


def takes(q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None, is_causal: bool) -> bool:
    """Return whether the extension itself computes attention of these operands."""
    return mask is None and sinks is None and not is_causal and q.shape[1] == k.shape[1]


def multihead_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, N, e) in q's dtype and layout, and the rows' statistics, zeros from the reference."""
    if takes(q, k, mask, sinks, is_causal):
        return attention.attention_fwd(q, k, v, scale)
    return reference.multihead_fwd(q, k, v, scale, mask, sinks, is_causal)[0], empty_stats(q).zero_()


def multihead_bwd(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    scale: float,
    mask: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dsinks) of <grad_o, O>; the last is empty if there are no sinks."""
    if not takes(q, k, mask, sinks, is_causal):
        return reference.multihead_bwd(grad_o, q, k, v, o, stats, scale, mask, sinks, is_causal)
    return *attention.attention_bwd(grad_o, q, k, v, o, stats, scale), q.new_empty(0)


def multihead_bwd_bwd(
    ggq: Tensor,
    ggk: Tensor,
    ggv: Tensor,
    gg_sinks: Tensor,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    scale: float,
    mask: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to (grad_o, q, k, v, sinks), as in the reference."""
    if not takes(q, k, mask, sinks, is_causal):
        return reference.multihead_bwd_bwd(
            ggq, ggk, ggv, gg_sinks, grad_o, q, k, v, o, stats, scale, mask, sinks, is_causal
        )
    gradients = attention.attention_bwd_bwd(ggq, ggk, ggv, grad_o, q, k, v, o, stats, scale)
    return *gradients, q.new_empty(0)
