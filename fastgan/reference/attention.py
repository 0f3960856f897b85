"""Attention O = softmax(scale Q K^T) V and its first and second gradients, in plain PyTorch.

``attention_eager`` is the textbook formula, differentiable to any order, with N x M maps in memory: the oracle of
tests and the baseline of benchmarks. The other three are the CPU path. They walk over blocks of query rows, so that
memory stays O(N + M), and they compute half-precision operands in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgan.layout import empty_rows_like

# A block of maps: large enough for the products to be efficient, small enough to stay in the last-level cache.
BLOCK_BYTES = 1 << 22


def attention_eager(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale q k^T) v with the maps materialised. q (B, N, d), k (B, M, d), v (B, M, e) -> (B, N, e)."""
    logits = q @ k.transpose(1, 2)
    if scale != 1.0:  # as the eager block: no pass over the maps that it would not make
        logits = scale * logits
    return torch.softmax(logits, dim=-1) @ v


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, e) in q's dtype and two statistics of each row, (2, B, N).

    They are the largest logit, top = max(q k^T), and log(sum(exp(scale (q k^T - top)))). Kept apart, they give P back
    as exactly as eager softmax computes it, however large the logits; their sum, the log-sum-exp, would not.
    ``scale`` must be >= 0.
    """
    o, stats = empty_rows_like(q, v.shape[2]), q.new_empty(2, *q.shape[:2], dtype=_wide(q.dtype))
    kt, v = _widen(k).transpose(1, 2), _widen(v)
    (maps,) = _map_buffers(q, k, 1)
    for batch, rows in _blocks(q, k):
        s = torch.bmm(_widen(q[batch, rows]), kt[batch], out=_block(maps, batch, rows, k))
        top = s.amax(dim=-1, keepdim=True)
        p = _scaled(s.sub_(top), scale).exp_()
        total = p.sum(dim=-1, keepdim=True)
        o[batch, rows] = torch.bmm(p, v[batch]).div_(total)
        stats[0, batch, rows], stats[1, batch, rows] = top.squeeze(-1), total.log_().squeeze(-1)
    return o, stats


def attention_bwd(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of <grad_o, O>; P is recomputed from the saved row statistics."""
    dq = torch.empty_like(q)
    dk, dv = _zeros(k), _zeros(v)
    k_wide, v_wide = _widen(k), _widen(v)
    kt, vt = k_wide.transpose(1, 2), v_wide.transpose(1, 2)
    p_maps, ds_maps = _map_buffers(q, k, 2)
    for batch, rows in _blocks(q, k):
        q_rows, do_rows = _widen(q[batch, rows]), _widen(grad_o[batch, rows])
        p_block, ds_block = (_block(maps, batch, rows, k) for maps in (p_maps, ds_maps))
        p = _probabilities(q_rows, kt[batch], stats[:, batch, rows], scale, out=p_block)
        dv[batch].baddbmm_(p.transpose(1, 2), do_rows)
        delta = (do_rows * o[batch, rows]).sum(dim=-1, keepdim=True)
        ds = torch.bmm(do_rows, vt[batch], out=ds_block).sub_(delta).mul_(p)
        dq[batch, rows] = torch.bmm(ds, k_wide[batch]).mul_(scale)
        dk[batch].baddbmm_(ds.transpose(1, 2), q_rows, alpha=scale)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


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
        B = A * c - dP * a + dO ggv^T      S2 = P * (B - rowsum(P * B))
        g_dO = E V + P ggv                 gq = scale (S2 K + dS ggk)
        gk = scale (S2^T Q + dS^T ggq)     gv = E^T dO             dS = P * c
    """
    g_do = torch.empty_like(o)
    gq = torch.empty_like(q)
    gk, gv = _zeros(k), _zeros(v)
    k_wide, v_wide, ggk_wide, ggv_wide = _widen(k), _widen(v), _widen(ggk), _widen(ggv)
    for batch, rows in _blocks(q, k):
        q_rows, do_rows, ggq_rows = _widen(q[batch, rows]), _widen(grad_o[batch, rows]), _widen(ggq[batch, rows])
        kb, vb, ggkb, ggvb = k_wide[batch], v_wide[batch], ggk_wide[batch], ggv_wide[batch]
        p = _probabilities(q_rows, kb.transpose(1, 2), stats[:, batch, rows], scale)
        dp = torch.bmm(do_rows, vb.transpose(1, 2))
        delta = (do_rows * o[batch, rows]).sum(dim=-1, keepdim=True)
        a_map = torch.bmm(ggq_rows, kb.transpose(1, 2)).baddbmm_(q_rows, ggkb.transpose(1, 2)).mul_(scale)
        a_row = (a_map * p).sum(dim=-1, keepdim=True)
        e_map = (a_map - a_row).mul_(p)
        c = dp - delta
        ds = p * c
        b_map = a_map.mul_(c).sub_(dp.mul_(a_row)).baddbmm_(do_rows, ggvb.transpose(1, 2))
        s2 = b_map.sub_((p * b_map).sum(dim=-1, keepdim=True)).mul_(p)
        g_do[batch, rows] = torch.bmm(e_map, vb).baddbmm_(p, ggvb)
        gq[batch, rows] = torch.bmm(s2, kb).baddbmm_(ds, ggkb).mul_(scale)
        gk[batch].baddbmm_(s2.transpose(1, 2), q_rows, alpha=scale)
        gk[batch].baddbmm_(ds.transpose(1, 2), ggq_rows, alpha=scale)
        gv[batch].baddbmm_(e_map.transpose(1, 2), do_rows)
    return g_do, gq, gk.to(k.dtype), gv.to(v.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=_wide(x.dtype))


def _probabilities(q_rows: Tensor, kt: Tensor, stats: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    top, log_total = stats.unsqueeze(-1)
    return _scaled(torch.bmm(q_rows, kt, out=out).sub_(top), scale).sub_(log_total).exp_()


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
    """(batch, rows) slices that cover B x N, each of whose maps takes about BLOCK_BYTES."""
    b, n, _ = q.shape
    row_bytes = max(1, k.shape[1]) * _wide(q.dtype).itemsize
    rows = max(1, min(n, BLOCK_BYTES // row_bytes))
    batch = max(1, min(b, BLOCK_BYTES // (row_bytes * rows)))
    for i in range(0, b, batch):
        for j in range(0, n, rows):
            yield slice(i, min(i + batch, b)), slice(j, min(j + rows, n))
