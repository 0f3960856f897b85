"""Forward and backward of attention.

In the kernels that own rows of queries a program walks over the keys; in those that own keys it walks over the
queries, so that every output is summed by one program in a fixed order: deterministic, no atomics. Where v has too
many channels for the registers (SLAB below E), products over them are summed slab by slab, and outputs as wide as v
come from launches of their own (V without QK), one program for each slab.

``heads`` is None for one unmasked head. Else it is a tuple: the number of heads, heads of q per head of k and v, and
the strides from head to head of all operands. Logits are then multiplied by ``scale`` before their largest is taken,
and a row that sees no key is 0. ``mask`` is None or a pointer and four strides. A sink is one more key with a logit of
its own and no value: it takes part only in the sums over a row.

WHOLE says that the tiles which a program walks over end with the last key or row, so that none needs a mask.

Shapes in comments: R query rows and C keys of a tile, D the padded channels of q and k, E those of all slabs of v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.kernels.attention.tiles import (
    LOG2E,
    end_of_keys,
    load_rows,
    load_tile,
    masked,
    multiple,
    other_slabs,
    probabilities,
    row_delta,
    row_stats,
    rows_of_part,
    sink_share,
    store_tile,
)
from fastgan.kernels.precision import dot, dot_of_map, narrow


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, stats_ptr,
    q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se, o_sb, o_sn, o_se,
    N, M, d, e, scale, plane, heads, mask, sinks,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SLAB: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr = False, UNIT: tl.constexpr = 1, WHOLE: tl.constexpr = False,
):  # fmt: skip
    d, e = multiple(d, UNIT), multiple(e, UNIT)
    q_sb, q_sn = multiple(q_sb, UNIT), multiple(q_sn, UNIT)
    k_sb, k_sm = multiple(k_sb, UNIT), multiple(k_sm, UNIT)
    v_sb, v_sm = multiple(v_sb, UNIT), multiple(v_sm, UNIT)
    o_sb, o_sn = multiple(o_sb, UNIT), multiple(o_sn, UNIT)
    blocks = tl.cdiv(N, R)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    scale_log2 = scale * LOG2E  # scale >= 0, so that the largest logit stays the largest
    image = batch
    if heads is not None:
        H, group, q_sh, k_sh, v_sh, o_sh = heads
        image, head, key_head = batch // H, batch % H, batch % H // group
        q_ptr += head * q_sh
        k_ptr += key_head * k_sh
        v_ptr += key_head * v_sh
        o_ptr += head * o_sh
        scale_log2 = LOG2E
    cols_d, cols_e = tl.arange(0, D), tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    k_base, v_base = k_ptr + image * k_sb, v_ptr + image * v_sb

    q = load_tile(q_ptr + image * q_sb, rows, cols_d, q_sn, q_sd, N, d)  # [R, D]
    if sinks is not None:
        top = tl.zeros([R], tl.float32) + tl.load(sinks + head)
        total = tl.full([R], 1.0, tl.float32)
    else:
        top = tl.full([R], float("-inf"), tl.float32)
        total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, SLAB], tl.float32)
    for start in range(0, end_of_keys(M, blocks, R, CAUSAL), C):
        keys = start + tl.arange(0, C)
        k = load_tile(k_base, keys, cols_d, k_sm, k_sd, M, d, WHOLE)  # [C, D]
        s = dot(q, tl.trans(k), None, PRECISION)  # [R, C]
        s = masked(s, heads, mask, batch, rows[:, None], keys[None, :], scale, N, M, CAUSAL)
        if not WHOLE:
            s = tl.where(keys[None, :] < M, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        finite_top = new_top
        if heads is not None:  # -inf as long as all keys are masked
            finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - finite_top[:, None]) * scale_log2)
        shrink = tl.exp2((top - finite_top) * scale_log2)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_base, keys, cols_e, v_sm, v_se, M, e, WHOLE)  # [C, SLAB]
        acc = dot_of_map(narrow(p, v.dtype), v, acc * shrink[:, None], PRECISION)
        top = new_top
    if heads is not None:  # a row without a key: P = 0 and O = 0
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.where(total == 0.0, 1.0, total)
    store_tile(o_ptr + image * o_sb, acc / total[:, None], rows, cols_e, o_sn, o_se, N, e)
    if tl.program_id(1) == 0:
        stats = stats_ptr + batch * N + rows
        tl.store(stats, top, mask=rows < N)
        tl.store(stats + plane, tl.log(total), mask=rows < N)


@triton.jit
def attention_bwd_rows_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, stats_ptr, delta_ptr, dq_ptr,
    do_sb, do_sn, do_se, q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se, o_sb, o_sn, o_se, dq_sb, dq_sn, dq_sd,
    N, M, d, e, scale, plane, heads, mask, sinks,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SLAB: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr = False, UNIT: tl.constexpr = 1, WHOLE: tl.constexpr = False,
):  # fmt: skip
    d, e = multiple(d, UNIT), multiple(e, UNIT)
    do_sb, do_sn = multiple(do_sb, UNIT), multiple(do_sn, UNIT)
    q_sb, q_sn = multiple(q_sb, UNIT), multiple(q_sn, UNIT)
    k_sb, k_sm = multiple(k_sb, UNIT), multiple(k_sm, UNIT)
    v_sb, v_sm = multiple(v_sb, UNIT), multiple(v_sm, UNIT)
    o_sb, o_sn = multiple(o_sb, UNIT), multiple(o_sn, UNIT)
    dq_sb, dq_sn = multiple(dq_sb, UNIT), multiple(dq_sn, UNIT)
    blocks = tl.cdiv(N, R)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    scale_log2 = scale * LOG2E
    image = batch
    if heads is not None:
        H, group, do_sh, q_sh, k_sh, v_sh, o_sh, dq_sh = heads
        image, head, key_head = batch // H, batch % H, batch % H // group
        do_ptr += head * do_sh
        q_ptr += head * q_sh
        k_ptr += key_head * k_sh
        v_ptr += key_head * v_sh
        o_ptr += head * o_sh
        dq_ptr += head * dq_sh
        scale_log2 = LOG2E
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, SLAB)
    k_base, v_base, do_base = k_ptr + image * k_sb, v_ptr + image * v_sb, do_ptr + image * do_sb
    # O is rounded to half precision, and so is delta; the resulting row sums of dS are subtracted at the end.
    HALF: tl.constexpr = o_ptr.dtype.element_ty != tl.float32

    q = load_tile(q_ptr + image * q_sb, rows, cols_d, q_sn, q_sd, N, d)  # [R, D]
    do = load_tile(do_base, rows, cols_e, do_sn, do_se, N, e)  # [R, SLAB]
    delta = row_delta(do_base, o_ptr + image * o_sb, rows, do_sn, do_se, o_sn, o_se, N, e, E, SLAB)
    top, log_total = row_stats(stats_ptr + batch * N, rows, N, plane)
    dq = tl.zeros([R, D], tl.float32)
    if HALF:
        mean_key = tl.zeros([R, D], tl.float32)
        missing = tl.zeros([R], tl.float32)
        if sinks is not None:
            missing -= sink_share(sinks + head, top, log_total) * delta
    else:  # rows of dS sum to 0 up to rounding, which is multiplied by less if keys are far from 0
        first_key = tl.load(k_base + cols_d.to(tl.int64) * k_sd, mask=cols_d < d, other=0.0)
    for start in range(0, end_of_keys(M, blocks, R, CAUSAL), C):
        keys = start + tl.arange(0, C)
        k = load_tile(k_base, keys, cols_d, k_sm, k_sd, M, d, WHOLE)  # [C, D]
        v = load_tile(v_base, keys, cols_e, v_sm, v_se, M, e, WHOLE)  # [C, SLAB]
        s = dot(q, tl.trans(k), None, PRECISION)  # [R, C]
        s = masked(s, heads, mask, batch, rows[:, None], keys[None, :], scale, N, M, CAUSAL)
        p = probabilities(s, top, log_total, scale_log2, keys, M, WHOLE)
        dp = dot(do, tl.trans(v), None, PRECISION)  # [R, C]
        dp = other_slabs(dp, do_base, rows, do_sn, do_se, N, v_base, keys, v_sm, v_se, M, e, E, SLAB, PRECISION)
        ds = p * (dp - delta[:, None])
        if not HALF:
            k -= first_key[None, :]
        dq = dot_of_map(narrow(ds, k.dtype), k, dq, PRECISION)
        if HALF:
            mean_key = dot_of_map(narrow(p, k.dtype), k, mean_key, PRECISION)
            missing += tl.sum(ds, 1)
    if HALF:
        dq -= missing[:, None] * mean_key
        delta += missing
    elif sinks is not None:  # with it, rows of dS sum to 0
        dq += (sink_share(sinks + head, top, log_total) * delta)[:, None] * first_key[None, :]
    tl.store(delta_ptr + batch * N + rows, delta, mask=rows < N)
    store_tile(dq_ptr + image * dq_sb, dq * scale, rows, cols_d, dq_sn, dq_sd, N, d)


@triton.jit
def attention_bwd_keys_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr,
    do_sb, do_sn, do_se, q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se,
    dk_sb, dk_sm, dk_sd, dv_sb, dv_sm, dv_se,
    N, M, d, e, scale, plane, heads, mask,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SLAB: tl.constexpr, PRECISION: tl.constexpr,
    QK: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr = False,
    UNIT: tl.constexpr = 1, WHOLE: tl.constexpr = False,
):  # fmt: skip
    d, e = multiple(d, UNIT), multiple(e, UNIT)
    do_sb, do_sn = multiple(do_sb, UNIT), multiple(do_sn, UNIT)
    q_sb, q_sn = multiple(q_sb, UNIT), multiple(q_sn, UNIT)
    k_sb, k_sm = multiple(k_sb, UNIT), multiple(k_sm, UNIT)
    v_sb, v_sm = multiple(v_sb, UNIT), multiple(v_sm, UNIT)
    dk_sb, dk_sm = multiple(dk_sb, UNIT), multiple(dk_sm, UNIT)
    dv_sb, dv_sm = multiple(dv_sb, UNIT), multiple(dv_sm, UNIT)
    blocks = tl.cdiv(M, C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    keys = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    scale_log2 = scale * LOG2E
    image = batch
    if heads is not None:
        H, group, do_sh, q_sh, k_sh, v_sh, dk_sh, dv_sh = heads
        image, head, key_head = batch // H, batch % H, batch % H // group
        do_ptr += head * do_sh
        q_ptr += head * q_sh
        k_ptr += key_head * k_sh
        v_ptr += key_head * v_sh
        dk_ptr += head * dk_sh
        dv_ptr += head * dv_sh
        scale_log2 = LOG2E
    if PARTS > 1:  # each part of the rows writes sums of its own, to be added up
        dk_ptr += tl.program_id(2).to(tl.int64) * (plane // N) * M * d
        dv_ptr += tl.program_id(2).to(tl.int64) * (plane // N) * M * e
    cols_d, cols_e = tl.arange(0, D), tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    q_base, v_base, do_base = q_ptr + image * q_sb, v_ptr + image * v_sb, do_ptr + image * do_sb

    k = load_tile(k_ptr + image * k_sb, keys, cols_d, k_sm, k_sd, M, d)  # [C, D]
    if QK:
        v = load_tile(v_base, keys, cols_e, v_sm, v_se, M, e)  # [C, SLAB]
        dk = tl.zeros([C, D], tl.float32)
    if V:
        dv = tl.zeros([C, SLAB], tl.float32)
    begin, end = rows_of_part(N, blocks, R, C, PARTS, CAUSAL)
    for start in range(begin, end, R):
        rows = start + tl.arange(0, R)
        q = load_tile(q_base, rows, cols_d, q_sn, q_sd, N, d, WHOLE)  # [R, D]
        do = load_tile(do_base, rows, cols_e, do_sn, do_se, N, e, WHOLE)  # [R, SLAB]
        top, log_total = row_stats(stats_ptr + batch * N, rows, N, plane, WHOLE)
        s = dot(k, tl.trans(q), None, PRECISION)  # [C, R]
        s = masked(s, heads, mask, batch, rows[None, :], keys[:, None], scale, N, M, CAUSAL)
        p = tl.exp2((s - top[None, :]) * scale_log2 - log_total[None, :])
        if V:
            dv = dot_of_map(narrow(p, do.dtype), do, dv, PRECISION)
        if QK:
            delta = load_rows(delta_ptr + batch * N, rows, N, WHOLE)
            dp = dot(v, tl.trans(do), None, PRECISION)  # [C, R]
            dp = other_slabs(dp, v_base, keys, v_sm, v_se, M, do_base, rows, do_sn, do_se, N, e, E, SLAB, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = dot_of_map(narrow(ds, q.dtype), q, dk, PRECISION)
    if QK:
        store_tile(dk_ptr + image * dk_sb, dk * scale, keys, cols_d, dk_sm, dk_sd, M, d)
    if V:
        store_tile(dv_ptr + image * dv_sb, dv, keys, cols_e, dv_sm, dv_se, M, e)
