"""Launchers of the fused attention kernels: same names, arguments and results as in ``fastgan.reference.attention``.

Forward, backward and double backward each stream over tiles; none has an N x M map in memory. They take 1, 2 and 2
launches, one more for each kernel where v's channels are split into slabs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fastgan._layout import empty_rows_like
from fastgan.kernels.attention.config import Tile, padded, tile_for
from fastgan.kernels.attention.double_backward import attention_bwd_bwd_keys_kernel, attention_bwd_bwd_rows_kernel
from fastgan.kernels.attention.kernels import attention_bwd_keys_kernel, attention_bwd_rows_kernel, attention_fwd_kernel
from fastgan.kernels.launch import launch, on_its_device
from fastgan.kernels.precision import input_precision


@on_its_device
def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, e) in q's dtype and two statistics of each row, float32 (2, B, N).

    They are the largest logit, top = max(q k^T), and log(sum(exp(scale (q k^T - top)))). Kept apart, they give P back
    as exactly as eager softmax computes it, however large the logits; their sum, the log-sum-exp, would not.
    ``scale`` must be >= 0.
    """
    (b, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    o, stats = empty_rows_like(q, e), empty_stats(q)
    if o.numel():
        tile = tile_for("fwd", e, q)
        launch(
            attention_fwd_kernel,
            tile,
            _programs("rows", n, b, triton.cdiv(e, tile.slab)),
            (q, k, v, o, stats, *_strides(q, k, v, o), n, m, d, e, scale, b * n),
            D=padded(d),
            PRECISION=input_precision(q.dtype),
        )
    return o, stats


def empty_stats(q: Tensor) -> Tensor:
    """Memory for the statistics of each row."""
    return q.new_empty(2, *q.shape[:2], dtype=torch.float32)


@on_its_device
def attention_bwd(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastgan.reference.attention.attention_bwd`."""
    (b, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    if not b * n:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = stats.new_empty(b, n)
    sizes = (n, m, d, e, scale, b * n)
    constants: dict[str, Any] = {"D": padded(d), "E": padded(e), "PRECISION": input_precision(q.dtype)}
    launch(
        attention_bwd_rows_kernel,
        tile_for("bwd_rows", e, q),
        _programs("rows", n, b, 1),
        (grad_o, q, k, v, o, stats, delta, dq, *_strides(grad_o, q, k, v, o, dq), *sizes),
        **constants,
    )
    tile = tile_for("bwd_keys", e, q)
    for outputs, slabs in tile.passes(e):
        launch(
            attention_bwd_keys_kernel,
            tile,
            _programs("keys", m, b, slabs),
            (grad_o, q, k, v, stats, delta, dk, dv, *_strides(grad_o, q, k, v, dk, dv), *sizes),
            **constants,
            **outputs,
        )
    return dq, dk, dv


@on_its_device
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
    """As :func:`fastgan.reference.attention.attention_bwd_bwd`, where the formulas are."""
    (b, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    if not b * n:
        return torch.zeros_like(o), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    g_do, gq, gk, gv = torch.empty_like(o), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sums = stats.new_empty(3, b, n)  # delta, rowsum(A * P), rowsum(P * B)
    strides = _strides(ggq, ggk, ggv, grad_o, q, k, v)
    sizes = (n, m, d, e, scale, b * n)
    logits = input_precision(q.dtype)
    constants: dict[str, Any] = {"D": padded(d), "E": padded(e), "LOGITS": logits}
    tile = tile_for("bwd_bwd_rows", e, q)
    for outputs, slabs in tile.passes(e):
        launch(
            attention_bwd_bwd_rows_kernel,
            tile,
            _programs("rows", n, b, slabs),
            (ggq, ggk, ggv, grad_o, q, k, v, o, stats, sums, g_do, gq, *strides, *_strides(o, g_do, gq), *sizes),
            PRECISION="ieee" if tile.scalar else logits,
            **constants,
            **outputs,
        )
    tile = tile_for("bwd_bwd_keys", e, q)
    for outputs, slabs in tile.passes(e):
        launch(
            attention_bwd_bwd_keys_kernel,
            tile,
            _programs("keys", m, b, slabs),
            (ggq, ggk, ggv, grad_o, q, k, v, stats, sums, gk, gv, *strides, *_strides(gk, gv), *sizes),
            PRECISION="ieee" if tile.scalar else logits,
            **constants,
            **outputs,
        )
    return g_do, gq, gk, gv


def _programs(side: str, size: int, b: int, slabs: int) -> Callable[[Tile], tuple[int, int]]:
    """Return the grid for a tile: programs that own part of one ``side`` of the map, "rows" or "keys", times slabs."""
    return lambda tile: (triton.cdiv(size, getattr(tile, side)) * b, slabs)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()]
