"""Attention O = softmax(scale Q K^T) V and its first and second gradients by the C++ extension, on a CPU.

The signatures are those of ``fastgan.reference.attention``. Two statistics of each row are kept, from which the
probabilities are recomputed tile by tile; half-precision operands are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._layout import empty_rows_like
from fastgan.backend import load_extension

load_extension()
_fwd = torch.ops.fastgan_C.attention_fwd.default
_bwd = torch.ops.fastgan_C.attention_bwd.default
_bwd_bwd = torch.ops.fastgan_C.attention_bwd_bwd.default


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, e) in q's dtype and layout, and the rows' statistics."""
    o, stats = empty_rows_like(q, v.shape[-1]), empty_stats(q)
    _fwd(q, k, v, None, None, False, scale, o, stats)
    return o, stats


def empty_stats(q: Tensor) -> Tensor:
    """Return an uninitialized (.., N, 2): each row's largest q k^T, and 1 / the sum of exponentials relative to it."""
    return q.new_empty(*q.shape[:-1], 2, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def attention_bwd(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of <grad_o, O>."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _bwd(grad_o, q, k, v, None, None, o, stats, False, scale, dq, dk, dv, None)
    return dq, dk, dv


def attention_bwd_bwd(
    ggq: Tensor,
    ggk: Tensor | None,
    ggv: Tensor | None,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to (grad_o, q, k, v) of <ggq, dq> + <ggk, dk> + <ggv, dv>, as in the reference.

    A ggk or ggv that is None is zero, and what it would be multiplied with is not computed.
    """
    g_do, gq, gk, gv = torch.empty_like(o), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _bwd_bwd(ggq, ggk, ggv, None, grad_o, q, k, v, None, None, stats, False, scale, g_do, gq, gk, gv, None)
    return g_do, gq, gk, gv
