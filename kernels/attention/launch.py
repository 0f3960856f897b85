"""Launchers of the fused attention kernels: same names, arguments and results as in ``fastgan.reference.attention``.

Forward, backward and double backward each stream over tiles; none has an N x M map in memory. They take 1, 2 and 2
launches, plus one per kernel if v's channels are split into slabs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastgan._layout import empty_rows_like
from fastgan.kernels.attention.config import Operands, Tile, padded, parts_of_rows, passes
from fastgan.kernels.attention.double_backward import attention_bwd_bwd_keys_kernel, attention_bwd_bwd_rows_kernel
from fastgan.kernels.attention.kernels import attention_bwd_keys_kernel, attention_bwd_rows_kernel, attention_fwd_kernel
from fastgan.kernels.launch import launch, on_its_device
from fastgan.kernels.precision import input_precision


@dataclass(frozen=True)
class Heads:
    """Options of a call beyond one unmasked head; its operands are (B, H, N, channels), k's and v's H / group heads.

    Attributes:
        count: H.
        group: heads of q per head of k and v.
        mask: boolean or floating-point (B, H, N, M), or None.
        sinks: float32 (H,), or None.
        is_causal: row i sees the keys up to the i-th alone.
    """

    count: int
    group: int
    mask: Tensor | None
    sinks: Tensor | None
    is_causal: bool


@on_its_device
def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, heads: Heads | None = None) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, e) in q's dtype and two statistics of each row, float32 (2, B, N).

    They are the largest logit, top = max(q k^T), and log(sum(exp(scale (q k^T - top)))). Kept apart, they give P back
    as exactly as eager softmax computes it, however large the logits; their sum, the log-sum-exp, would not.
    ``scale`` must be >= 0. With ``heads``, H follows B in all shapes and top = max(scale q k^T + mask).
    """
    b, (n, d), m, e = math.prod(q.shape[:-2]), q.shape[-2:], k.shape[-2], v.shape[-1]
    if not _are_loadable(q, k, v):
        q_rows, k_rows, v_rows = _in_rows(q, k, v)
        o, stats = attention_fwd(q_rows, k_rows, v_rows, scale, heads)
        return empty_rows_like(q, e).copy_(o[..., :e]), stats
    o, stats = empty_rows_like(q, e), empty_stats(q)
    sinks = None if heads is None else heads.sinks
    if o.numel():
        (one,) = passes("fwd", e, q, _kind(heads))
        launch(
            attention_fwd_kernel,
            one.tile,
            _programs("rows", n, b, one.slabs),
            (q, k, v, o, stats, *_strides(q, k, v, o), n, m, d, e, scale, b * n, *_of_heads(heads, q, k, v, o), sinks),
            D=padded(d),
            PRECISION=input_precision(q.dtype),
            CAUSAL=heads is not None and heads.is_causal,
            UNIT=_unit(q, k, v, o),
            WHOLE=m % one.tile.keys == 0,
        )
    return o, stats


def empty_stats(q: Tensor) -> Tensor:
    """Memory for the statistics of each row."""
    return q.new_empty(2, *q.shape[:-1], dtype=torch.float32)


@on_its_device
def attention_bwd(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    scale: float,
    heads: Heads | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch :func:`fastgan.reference.attention.attention_bwd`; dk and dv of grouped heads are sums over each group."""
    b, (n, d), m, e = math.prod(q.shape[:-2]), q.shape[-2:], k.shape[-2], v.shape[-1]
    if not b * n:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if not _are_loadable(grad_o, q, k, v, o):
        do_rows, q_rows, k_rows, v_rows, o_rows = _in_rows(grad_o, q, k, v, o)
        dq, dk, dv = attention_bwd(do_rows, q_rows, k_rows, v_rows, o_rows, stats, scale, heads)
        return _copied(dq, q), _copied(dk, k), _copied(dv, v)
    over_keys = passes("bwd_keys", e, q, _kind(heads))
    parts = [parts_of_rows(one, b, n, m, q.device) for one in over_keys]
    dq, dk, dv = torch.empty_like(q), _empty_sums(k, heads, parts[0]), _empty_sums(v, heads, parts[-1])
    first = [sums if sums.ndim == k.ndim else sums[0] for sums in (dk, dv)]  # the output of the first part
    delta = stats.new_empty(b, n)
    sizes = (n, m, d, e, scale, b * n)
    constants: dict[str, Any] = {"D": padded(d), "PRECISION": input_precision(q.dtype)}
    constants |= {"CAUSAL": heads is not None and heads.is_causal, "UNIT": _unit(grad_o, q, k, v, o, dq, *first)}
    sinks = None if heads is None else heads.sinks
    (one,) = passes("bwd_rows", e, q, _kind(heads))
    launch(
        attention_bwd_rows_kernel,
        one.tile,
        _programs("rows", n, b, 1),
        (
            grad_o,
            q,
            k,
            v,
            o,
            stats,
            delta,
            dq,
            *_strides(grad_o, q, k, v, o, dq),
            *sizes,
            *_of_heads(heads, grad_o, q, k, v, o, dq),
            sinks,
        ),
        E=_of_slabs(e, one.tile),
        WHOLE=m % one.tile.keys == 0,
        **constants,
    )
    for one, count in zip(over_keys, parts, strict=True):
        launch(
            attention_bwd_keys_kernel,
            one.tile,
            _programs("keys", m, b, one.slabs, count),
            (
                grad_o,
                q,
                k,
                v,
                stats,
                delta,
                dk,
                dv,
                *_strides(grad_o, q, k, v, *first),
                *sizes,
                *_of_heads(heads, grad_o, q, k, v, *first),
            ),
            E=_of_slabs(e, one.tile),
            WHOLE=n % one.tile.rows == 0,
            **constants,
            **one.outputs,
            PARTS=count,
        )
    return dq, _total(dk, k, heads), _total(dv, v, heads)


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
    """Launch :func:`fastgan.reference.attention.attention_bwd_bwd`, which has the formulas."""
    g_do, gq, gk, gv, _ = bwd_bwd_and_sums(ggq, ggk, ggv, grad_o, q, k, v, o, stats, scale)
    return g_do, gq, gk, gv


@on_its_device
def bwd_bwd_and_sums(
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
    heads: Heads | None = None,
    gg_sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what :func:`attention_bwd_bwd` does and sums of each row, float32 (3, B, N) or (3, B, H, N).

    They are delta, rowsum(A * P) and rowsum(P * B), those of a sink included.
    ``gg_sinks``, float32 (H,), is the cotangent of the sinks' gradient.
    """
    b, (n, d), m, e = math.prod(q.shape[:-2]), q.shape[-2:], k.shape[-2], v.shape[-1]
    if not b * n:
        sums = stats.new_zeros(3, *q.shape[:-1])
        return torch.zeros_like(o), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), sums
    if not _are_loadable(ggq, ggk, ggv, grad_o, q, k, v, o):
        ggq, ggk, ggv, grad_o, q_rows, k_rows, v_rows, o_rows = _in_rows(ggq, ggk, ggv, grad_o, q, k, v, o)
        g_do, gq, gk, gv, sums = bwd_bwd_and_sums(
            ggq, ggk, ggv, grad_o, q_rows, k_rows, v_rows, o_rows, stats, scale, heads, gg_sinks
        )
        return _copied(g_do, o), _copied(gq, q), _copied(gk, k), _copied(gv, v), sums
    over_keys = passes("bwd_bwd_keys", e, q, _kind(heads))
    parts = [parts_of_rows(one, b, n, m, q.device) for one in over_keys]
    g_do, gq = torch.empty_like(o), torch.empty_like(q)
    gk, gv = _empty_sums(k, heads, parts[0]), _empty_sums(v, heads, parts[-1])
    first = [sums if sums.ndim == k.ndim else sums[0] for sums in (gk, gv)]  # the output of the first part
    sums = stats.new_empty(3, *q.shape[:-1])
    sinks = None if heads is None or heads.sinks is None else (heads.sinks, gg_sinks)
    operands = (ggq, ggk, ggv, grad_o, q, k, v)
    strides = _strides(*operands)
    sizes = (n, m, d, e, scale, b * n)
    logits = input_precision(q.dtype)
    constants: dict[str, Any] = {"D": padded(d), "LOGITS": logits}
    constants["CAUSAL"] = heads is not None and heads.is_causal
    constants["UNIT"] = _unit(*operands, o, g_do, gq, *first)
    for one in passes("bwd_bwd_rows", e, q, _kind(heads)):
        launch(
            attention_bwd_bwd_rows_kernel,
            one.tile,
            _programs("rows", n, b, one.slabs),
            (
                *operands,
                o,
                stats,
                sums,
                g_do,
                gq,
                *strides,
                *_strides(o, g_do, gq),
                *sizes,
                *_of_heads(heads, *operands, o, g_do, gq),
                sinks,
            ),
            PRECISION="ieee" if one.tile.scalar else logits,
            E=_of_slabs(e, one.tile),
            WHOLE=m % one.tile.keys == 0,
            **constants,
            **one.outputs,
        )
    for one, count in zip(over_keys, parts, strict=True):
        launch(
            attention_bwd_bwd_keys_kernel,
            one.tile,
            _programs("keys", m, b, one.slabs, count),
            (
                *operands,
                stats,
                sums,
                gk,
                gv,
                *strides,
                *_strides(*first),
                *sizes,
                *_of_heads(heads, *operands, *first),
            ),
            PRECISION="ieee" if one.tile.scalar else logits,
            E=_of_slabs(e, one.tile),
            WHOLE=n % one.tile.rows == 0,
            **constants,
            **one.outputs,
            PARTS=count,
        )
    return g_do, gq, _total(gk, k, heads), _total(gv, v, heads), sums


def _of_slabs(e: int, tile: Tile) -> int:
    """The channels of as many slabs as hold ``e``: fewer than the next power of two where those are not needed."""
    return triton.cdiv(e, tile.slab) * tile.slab


def _programs(side: str, size: int, b: int, slabs: int, parts: int = 1) -> Callable[[Tile], tuple[int, int, int]]:
    """Return the grid for a tile: programs that own part of one ``side`` of the map, "rows" or "keys", times slabs,
    times the parts of the other side."""
    return lambda tile: (triton.cdiv(size, getattr(tile, side)) * b, slabs, parts)


def _unit(*tensors: Tensor) -> int:
    """Return the largest power of two, up to 16, that divides all channels and strides of rows whose channels lie side
    by side; 1 for other layouts. So many channels can be loaded at once."""
    if any(x.stride(-1) != 1 for x in tensors):
        return 1
    return math.gcd(16, *(size for x in tensors for size in (x.shape[-1], *x.stride()[:-1])))


def _are_loadable(*tensors: Tensor) -> bool:
    """Return whether 16 bytes of each tensor can be loaded at once.

    The 16 bytes lie along the channels of all tensors or, in half precision, along the rows of all: float32 products
    would have to transpose what they load. Triton notices only multiples of 16 among lengths along rows.
    """
    if all(map(_has_aligned_rows, tensors)):
        return True
    return all(
        x.itemsize == 2
        and x.stride(-2) == 1
        and x.data_ptr() % 16 == math.gcd(x.shape[-2], *x.stride()[:-2], x.stride(-1)) % 16 == 0
        for x in tensors
    )


def _has_aligned_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 and x.data_ptr() % 16 == math.gcd(x.shape[-1], *x.stride()[:-1]) * x.itemsize % 16 == 0


def _in_rows(*tensors: Tensor) -> list[Tensor]:
    """Return tensors whose rows can be loaded 16 bytes at once, copying those whose rows cannot be. Zeros pad the
    channels to a multiple of 8.

    Loads of one entry at a time would take most of a kernel's time, and the registers of their addresses with it. A
    copy takes O(N).
    """
    return [x if x.shape[-1] % 8 == 0 and _has_aligned_rows(x) else _padded_rows(x) for x in tensors]


def _padded_rows(x: Tensor) -> Tensor:
    rows = x.new_zeros(*x.shape[:-1], -(-x.shape[-1] // 8) * 8)
    rows[..., : x.shape[-1]] = x
    return rows


def _copied(rows: Tensor, x: Tensor) -> Tensor:
    """Return the channels of ``rows`` that are no padding, in the layout of ``x``."""
    return torch.empty_like(x).copy_(rows[..., : x.shape[-1]])


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, rows and channels."""
    return [stride for x in tensors for stride in (x.stride() if x.ndim == 3 else (x.stride(0), *x.stride()[2:]))]


def _kind(heads: Heads | None) -> Operands:
    return "single" if heads is None else "heads" if heads.mask is None else "masked"


def _of_heads(heads: Heads | None, *tensors: Tensor) -> tuple[Any, Any]:
    """Return the arguments ``heads`` and ``mask`` of a kernel of these tensors."""
    if heads is None:
        return None, None
    mask = None if heads.mask is None else (heads.mask, *heads.mask.stride())
    return (heads.count, heads.group, *(x.stride(1) for x in tensors)), mask


def _empty_sums(x: Tensor, heads: Heads | None, parts: int) -> Tensor:
    """Memory for a gradient of k or v: float32 (parts, B, ..) if there are several, and one per head of q if several
    share x's."""
    if parts == 1 and (heads is None or heads.group == 1):
        return torch.empty_like(x)
    shape = x.shape if heads is None else (x.shape[0], heads.count, *x.shape[2:])
    return x.new_empty(parts, *shape, dtype=torch.float32)


def _total(sums: Tensor, x: Tensor, heads: Heads | None) -> Tensor:
    """Return the gradient of x that :func:`_empty_sums` made room for."""
    if sums.ndim == x.ndim:
        return sums
    if heads is not None:
        sums = sums.unflatten(2, (-1, heads.group)).sum(3)
    return torch.empty_like(x).copy_(sums.sum(0))
