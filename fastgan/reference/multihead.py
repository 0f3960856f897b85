"""Attention of several heads and its first and second gradients, in plain PyTorch: head by head, in O(N) memory.

q, o and their gradients are (B, H, N, channels), k and v (B, H / group, M, channels), ``mask`` (B, H, N, M) and
``sinks`` (H,), the last two or None.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgan._layout import empty_rows_like
from fastgan.reference.attention import Head, attention_fwd, empty_stats, head_bwd, head_bwd_bwd

__all__ = ["empty_stats", "multihead_bwd", "multihead_bwd_bwd", "multihead_fwd"]


def multihead_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, N, e) in q's dtype and layout, and the rows' statistics, here none."""
    o = empty_rows_like(q, v.shape[3])
    for i, j, head in _heads(q, k, mask, sinks, is_causal):
        o[:, i] = attention_fwd(q[:, i], k[:, j], v[:, j], scale, head)[0]
    return o, empty_stats(q)


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
    dq, d_sinks = torch.empty_like(q), _empty_sinks(q, sinks)
    dk, dv = _zeros(k, q), _zeros(v, q)
    for i, j, head in _heads(q, k, mask, sinks, is_causal):
        dq[:, i], dk_head, dv_head, d_sink = head_bwd(grad_o[:, i], q[:, i], k[:, j], v[:, j], o[:, i], scale, head)
        dk[:, j] += dk_head
        dv[:, j] += dv_head
        if sinks is not None:
            d_sinks[i] = d_sink
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_sinks


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
    """Gradients with respect to (grad_o, q, k, v, sinks) of <ggq, dq> + <ggk, dk> + <ggv, dv> + <gg_sinks, dsinks>."""
    g_do, gq, g_sinks = torch.empty_like(o), torch.empty_like(q), _empty_sinks(q, sinks)
    gk, gv = _zeros(k, q), _zeros(v, q)
    for i, j, head in _heads(q, k, mask, sinks, is_causal):
        gg_sink = q.new_zeros(()) if sinks is None else gg_sinks[i]
        g_do[:, i], gq[:, i], gk_head, gv_head, g_sink = head_bwd_bwd(
            ggq[:, i],
            ggk[:, j],
            ggv[:, j],
            gg_sink,
            grad_o[:, i],
            q[:, i],
            k[:, j],
            v[:, j],
            o[:, i],
            scale,
            head,
        )
        gk[:, j] += gk_head
        gv[:, j] += gv_head
        if sinks is not None:
            g_sinks[i] = g_sink
    return g_do, gq, gk.to(k.dtype), gv.to(v.dtype), g_sinks


def _heads(
    q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None, is_causal: bool
) -> Iterator[tuple[int, int, Head]]:
    """(head of q, its head of k and v, its mask and sink)."""
    group = q.shape[1] // max(1, k.shape[1])
    for i in range(q.shape[1]):
        head_mask, sink = None if mask is None else mask[:, i], None if sinks is None else sinks[i]
        yield i, i // group, Head(head_mask, sink, is_causal)


def _zeros(x: Tensor, q: Tensor) -> Tensor:
    """Memory for the sums of a gradient of k or v over heads, in float32 if several share one."""
    return torch.zeros_like(x, dtype=torch.float32 if x.dtype != torch.float64 and x.shape[1] < q.shape[1] else None)


def _empty_sinks(q: Tensor, sinks: Tensor | None) -> Tensor:
    return q.new_empty(0) if sinks is None else torch.empty_like(sinks)
