"""Launchers of attention beyond one unmasked head: names, arguments and results of ``fastgan.reference.multihead``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.kernels.attention import launch
from fastgan.kernels.attention.launch import Heads, empty_stats

__all__ = ["empty_stats", "multihead_bwd", "multihead_bwd_bwd", "multihead_fwd"]


def multihead_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Launch :func:`fastgan.reference.multihead.multihead_fwd`, with statistics of each row, float32 (2, B, H, N)."""
    return launch.attention_fwd(q, k, v, scale, _heads(q, k, mask, sinks, is_causal))


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
    """Launch :func:`fastgan.reference.multihead.multihead_bwd`."""
    heads = _heads(q, k, mask, sinks, is_causal)
    dq, dk, dv = launch.attention_bwd(grad_o, q, k, v, o, stats, scale, heads)
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    delta = (grad_o.float() * o.float()).sum(-1)
    return dq, dk, dv, -(_sink_share(stats, heads.sinks) * delta).sum((0, 2)).to(sinks.dtype)


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
    """Launch :func:`fastgan.reference.multihead.multihead_bwd_bwd`."""
    heads, gg_sinks = _heads(q, k, mask, sinks, is_causal), gg_sinks.float()
    *outputs, sums = launch.bwd_bwd_and_sums(ggq, ggk, ggv, grad_o, q, k, v, o, stats, scale, heads, gg_sinks)
    g_do, gq, gk, gv = outputs
    if sinks is None:
        return g_do, gq, gk, gv, q.new_empty(0)
    delta, a_row, b_row = sums
    share, b_sink = _sink_share(stats, heads.sinks), (a_row - gg_sinks[:, None]) * delta
    return g_do, gq, gk, gv, (share * (b_sink - b_row)).sum((0, 2)).to(sinks.dtype)


def _heads(q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None, is_causal: bool) -> Heads:
    return Heads(q.shape[1], q.shape[1] // k.shape[1], mask, None if sinks is None else sinks.float(), is_causal)


def _sink_share(stats: Tensor, sinks: Tensor | None) -> Tensor:
    """The probability of a head's sink in each row, (B, H, N)."""
    assert sinks is not None
    top, log_total = stats
    return torch.exp(sinks[:, None] - top - log_total)
