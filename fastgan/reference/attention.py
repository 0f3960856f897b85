"""Attention O = softmax(scale Q K^T) V and its first and second gradients, in plain PyTorch.

``attention_eager`` is the textbook formula, differentiable to any order, with N x M maps in memory: the oracle of
tests and the baseline of benchmarks. The others are the CPU path. They walk over blocks of query rows, so that
memory stays O(N + M), and they compute half-precision operands in float32. ``head_*`` compute one head, which may have
a mask and a sink; ``attention_*`` compute one head without either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgan._layout import empty_rows_like, is_channels_first

# A block of a map: large enough for the products to be efficient, small enough for a core's own cache.
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Head:
    """Everything that changes the probabilities of one head.

    Attributes:
        mask: boolean, False if the key is not seen, or added to the logits; (B, N, M), with strides of 0 if it repeats.
        sink: the logit of one more key, which has no value; a tensor of shape ().
        is_causal: row i sees the keys up to the i-th alone.
    """

    mask: Tensor | None = None
    sink: Tensor | None = None
    is_causal: bool = False


UNMASKED = Head()


def attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(scale q k^T) v with the maps materialized. q (B, N, d), k (B, M, d), v (B, M, e) -> (B, N, e).

    The result is in q's memory layout. Operands (B, H, N, channels) may have a mask (B, H, N, M) and sinks (H,).
    """
    if q.ndim == 4 and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(-2, -1)  # ONNX has no translation of mT
    if scale != 1.0:  # as the eager block: no pass over the maps that it would not make
        logits = scale * logits
    if is_causal:
        logits = logits.masked_fill(_above_diagonal(range(q.shape[-2]), k.shape[-2], q.device), float("-inf"))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(q.dtype)
    if sinks is not None:
        sink = sinks.to(q.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        p = torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :-1]
    elif mask is not None:
        unseen = (logits == float("-inf")).all(-1, keepdim=True)
        p = torch.softmax(logits.masked_fill(unseen, 0), dim=-1).masked_fill(unseen, 0)
    else:
        p = torch.softmax(logits, dim=-1)
    return (
        (v.transpose(-2, -1) @ p.transpose(-2, -1)).transpose(-2, -1) if q.ndim == 3 and is_channels_first(q) else p @ v
    )


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, head: Head = UNMASKED) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, e) in q's dtype and the rows' statistics, here none.

    The kernels keep two numbers of each row to recompute P tile by tile. A block here holds whole rows, whose softmax
    is as quick as an exponential of saved statistics.
    """
    o = empty_rows_like(q, v.shape[2])
    kt, v = _widen(k).transpose(1, 2), _widen(v)
    (maps,) = _map_buffers(q, k, 1)
    for batch, rows in _blocks(q, k):
        out = _block(maps, batch, rows, k)
        p, _ = _probabilities(_widen(q[batch, rows]), kt[batch], scale, out, head, batch, rows)
        o[batch, rows] = torch.bmm(p, v[batch])
    return o, empty_stats(q)


def empty_stats(q: Tensor) -> Tensor:
    """Stand-in for statistics in the result of :func:`attention_fwd`."""
    return q.new_empty(0, dtype=torch.float32)


def attention_bwd(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of <grad_o, O>; P is recomputed."""
    return head_bwd(grad_o, q, k, v, o, scale, UNMASKED)[:3]


def head_bwd(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float, head: Head
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dsink) of <grad_o, O>, the last () and 0 if there is no sink.

    A sink is a key without a value: its dP is 0, and with P the probability of it dsink = sum(P * (0 - delta)).
    """
    dq = torch.empty_like(q)
    dk, dv, d_sink = _zeros(k), _zeros(v), q.new_zeros((), dtype=_wide(q.dtype))
    k_wide, v_wide = _widen(k), _widen(v)
    kt, vt = k_wide.transpose(1, 2), v_wide.transpose(1, 2)
    p_maps, dp_maps = _map_buffers(q, k, 2)
    for batch, rows in _blocks(q, k):
        q_rows, do_rows = _widen(q[batch, rows]), _widen(grad_o[batch, rows])
        p, sink_share = _probabilities(q_rows, kt[batch], scale, _block(p_maps, batch, rows, k), head, batch, rows)
        dv[batch].baddbmm_(p.transpose(1, 2), do_rows)
        ds = _through_softmax(torch.bmm(do_rows, vt[batch], out=_block(dp_maps, batch, rows, k)), p)
        dq[batch, rows] = torch.bmm(ds, k_wide[batch]).mul_(scale)
        dk[batch].baddbmm_(ds.transpose(1, 2), q_rows, alpha=scale)
        if sink_share is not None:
            d_sink -= (sink_share * (do_rows * o[batch, rows]).sum(-1, keepdim=True)).sum()
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_sink


def attention_bwd_bwd(
    ggq: Tensor,
    ggk: Tensor,
    ggv: Tensor,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to (grad_o, q, k, v) of <ggq, dq> + <ggk, dk> + <ggv, dv>.

    O and the statistics are functions of q, k and v: their part is contained in the last three. With P the
    probabilities, dP = dO V^T, delta = rowsum(dO * O) and c = dP - delta::

        A = scale (ggq K^T + Q ggk^T)      a = rowsum(A * P)       E = P * (A - a)
        B = (A - a) * c + dO ggv^T         S2 = P * (B - rowsum(P * B))
        g_dO = E V + P ggv                 gq = scale (S2 K + dS ggk)
        gk = scale (S2^T Q + dS^T ggq)     gv = E^T dO             dS = P * c

    S2 does not see what is constant along a row of B, so that a * delta may be left in it.
    """
    no_sink = q.new_zeros((), dtype=_wide(q.dtype))
    return head_bwd_bwd(ggq, ggk, ggv, no_sink, grad_o, q, k, v, o, scale, UNMASKED)[:4]


def head_bwd_bwd(
    ggq: Tensor,
    ggk: Tensor,
    ggv: Tensor,
    gg_sink: Tensor,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    scale: float,
    head: Head,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Extend :func:`attention_bwd_bwd` by the gradient of the sink, with <gg_sink, dsink> in the sum.

    The sink is a column of the maps that has A = gg_sink, dP = 0 and no part in the products.
    """
    g_do = torch.empty_like(o)
    gq = torch.empty_like(q)
    gk, gv, g_sink = _zeros(k), _zeros(v), q.new_zeros((), dtype=_wide(q.dtype))
    k_wide, v_wide, ggk_wide, ggv_wide = _widen(k), _widen(v), _widen(ggk), _widen(ggv)
    p_maps, c_maps, a_maps, e_maps = _map_buffers(q, k, 4)
    for batch, rows in _blocks(q, k):
        q_rows, do_rows, ggq_rows = _widen(q[batch, rows]), _widen(grad_o[batch, rows]), _widen(ggq[batch, rows])
        kb, vb, ggkb, ggvb = k_wide[batch], v_wide[batch], ggk_wide[batch], ggv_wide[batch]
        p_block, c_block, a_block, e_block = (_block(x, batch, rows, k) for x in (p_maps, c_maps, a_maps, e_maps))
        p, sink_share = _probabilities(q_rows, kb.transpose(1, 2), scale, p_block, head, batch, rows)
        delta = (do_rows * o[batch, rows]).sum(dim=-1, keepdim=True)
        c = torch.bmm(do_rows, vb.transpose(1, 2), out=c_block).sub_(delta)
        a_map = torch.bmm(ggq_rows, kb.transpose(1, 2), out=a_block).baddbmm_(q_rows, ggkb.transpose(1, 2))
        a_map = _scaled(a_map, scale)
        a_row = torch.mul(a_map, p, out=e_block).sum(dim=-1, keepdim=True)
        if sink_share is not None:
            a_row += sink_share * gg_sink
        a_map.sub_(a_row)
        e_map = torch.mul(a_map, p, out=e_block)
        b_map = a_map.mul_(c).baddbmm_(do_rows, ggvb.transpose(1, 2))
        s2 = _through_softmax(b_map, p)
        if sink_share is not None:
            b_sink = (a_row - gg_sink) * delta
            b_row = torch.mul(b_map, p).sum(dim=-1, keepdim=True) + sink_share * b_sink
            s2 = s2 - p * (sink_share * b_sink)
            g_sink += (sink_share * (b_sink - b_row)).sum()
        ds = c.mul_(p)
        g_do[batch, rows] = torch.bmm(e_map, vb).baddbmm_(p, ggvb)
        gq[batch, rows] = torch.bmm(s2, kb).baddbmm_(ds, ggkb).mul_(scale)
        gk[batch].baddbmm_(s2.transpose(1, 2), q_rows, alpha=scale)
        gk[batch].baddbmm_(ds.transpose(1, 2), ggq_rows, alpha=scale)
        gv[batch].baddbmm_(e_map.transpose(1, 2), do_rows)
    return g_do, gq, gk.to(k.dtype), gv.to(v.dtype), g_sink


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=_wide(x.dtype))


def _probabilities(
    q_rows: Tensor, kt: Tensor, scale: float, out: Tensor, head: Head, batch: slice, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """The probabilities of a block, written to ``out``, and those of the sink (.., rows, 1), if there is one."""
    logits = _scaled(torch.bmm(q_rows, kt, out=out), scale)
    if head.is_causal:
        logits.masked_fill_(_above_diagonal(range(rows.start, rows.stop), kt.shape[2], kt.device), float("-inf"))
    if head.mask is None:
        unseen = None
    else:
        mask = head.mask[batch, rows]
        _ = logits.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else logits.add_(mask)
        unseen = (logits == float("-inf")).all(dim=-1, keepdim=True)
    total = None if head.sink is None else logits.logsumexp(dim=-1, keepdim=True)
    p = torch.softmax(logits, dim=-1, out=out)
    if unseen is not None:
        p.masked_fill_(unseen, 0)
    if total is None or head.sink is None:
        return p, None
    return p.mul_(torch.sigmoid(total - head.sink)), torch.sigmoid(head.sink - total)


def _above_diagonal(rows: range, keys: int, device: torch.device) -> Tensor:
    """Mask (rows, keys), True for keys after the row."""
    return torch.arange(keys, device=device) > torch.arange(rows.start, rows.stop, device=device)[:, None]


def _through_softmax(grad: Tensor, p: Tensor) -> Tensor:
    """P * (grad - rowsum(P * grad)), the gradient through P = softmax, in one pass."""
    return torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype)


def _map_buffers(q: Tensor, k: Tensor, count: int) -> list[Tensor]:
    """Flat memory for the maps of one block: fresh pages for every block would cost more than its exponentials."""
    size = max(((b.stop - b.start) * (r.stop - r.start) for b, r in _blocks(q, k)), default=0) * k.shape[1]
    return [torch.empty(size, dtype=_wide(q.dtype), device=q.device) for _ in range(count)]


def _block(maps: Tensor, batch: slice, rows: slice, k: Tensor) -> Tensor:
    shape = (batch.stop - batch.start, rows.stop - rows.start, k.shape[1])
    return maps[: shape[0] * shape[1] * shape[2]].view(shape)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.mul_(scale)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (batch, rows) slices that cover B x N; the map of each takes about BLOCK_BYTES."""
    b, n, _ = q.shape
    row_bytes = max(1, k.shape[1]) * _wide(q.dtype).itemsize
    rows = max(1, min(n, BLOCK_BYTES // row_bytes))
    batch = max(1, min(b, BLOCK_BYTES // (row_bytes * rows)))
    for i in range(0, b, batch):
        for j in range(0, n, rows):
            yield slice(i, min(i + batch, b)), slice(j, min(j + rows, n))
