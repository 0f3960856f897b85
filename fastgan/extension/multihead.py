"""Attention of several heads by the C++ extension, on a CPU: all heads in the same passes.

The signatures are those of ``fastgan.reference.multihead``. Masks are read tile by tile, with the strides that they
have. If attention is causal, tiles whose keys no row of theirs may see are left out, so that NaN in them is not seen
either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._layout import empty_rows_like
from fastgan.backend import load_extension
from fastgan.extension.attention import empty_stats

__all__ = ["empty_stats", "multihead_bwd", "multihead_bwd_bwd", "multihead_fwd"]

load_extension()
_fwd = torch.ops.fastgan_C.attention_fwd.default
_bwd = torch.ops.fastgan_C.attention_bwd.default
_bwd_bwd = torch.ops.fastgan_C.attention_bwd_bwd.default


def multihead_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, N, e) in q's dtype and layout, and the rows' statistics."""
    o, stats = empty_rows_like(q, v.shape[3]), empty_stats(q)
    _fwd(q, k, v, mask, _as_stats(sinks, stats), is_causal, scale, o, stats)
    return o, stats


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
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    wide = _as_stats(sinks, stats)
    d_sinks = None if wide is None else torch.empty_like(wide)
    _bwd(grad_o, q, k, v, mask, wide, o, stats, is_causal, scale, dq, dk, dv, d_sinks)
    return dq, dk, dv, _as_sinks(d_sinks, sinks, q)


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
    g_do, gq, gk, gv = torch.empty_like(o), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    wide, gg_wide = _as_stats(sinks, stats), None if sinks is None else _as_stats(gg_sinks, stats)
    g_sinks = None if wide is None else torch.empty_like(wide)
    options = (stats, is_causal, scale)
    _bwd_bwd(ggq, ggk, ggv, gg_wide, grad_o, q, k, v, mask, wide, *options, g_do, gq, gk, gv, g_sinks)
    return g_do, gq, gk, gv, _as_sinks(g_sinks, sinks, q)


def _as_stats(sinks: Tensor | None, stats: Tensor) -> Tensor | None:
    """Return ``sinks`` in the dtype of the arithmetic."""
    return None if sinks is None else sinks.to(stats.dtype).contiguous()


def _as_sinks(gradient: Tensor | None, sinks: Tensor | None, q: Tensor) -> Tensor:
    """Return a gradient in the dtype of ``sinks``, or an empty tensor if there are none."""
    return q.new_empty(0) if gradient is None or sinks is None else gradient.to(sinks.dtype)
