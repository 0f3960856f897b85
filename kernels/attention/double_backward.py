"""Double backward of attention: formulas in ``fastgan.reference.attention``, the scheme in ``attention.kernels``.

The logits are multiplied in the precision LOGITS of the forward pass, whose sums P is recomputed from: rows of P that
do not sum to 1 would cost more than the rounding of all other products.

In float32 the program that owns rows walks over the keys once for g_dO and once for gq, which needs rowsum(P * B) =
rowsum(dO * g_dO). In half precision O and g_dO are rounded too much for such sums: a walk before those of the outputs
adds up the entries of the maps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.kernels.attention.tiles import (
    LOG2E,
    eighths,
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
def load_keys(
    start, q, rows, top, log_total, k_base, k_sm, k_sd, ggk_base, ggk_sm, ggk_sd, v_base, v_sm, v_se,
    ggv_base, ggv_sm, ggv_se, cols_d, cols_e, heads, mask, batch, scale, scale_log2, N, M, d, e,
    C: tl.constexpr, LOGITS: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load C keys from ``start`` on, their values and the cotangents of both; recompute their columns of P."""
    keys = start + tl.arange(0, C)
    k = load_tile(k_base, keys, cols_d, k_sm, k_sd, M, d, WHOLE)  # [C, D]
    ggk = load_tile(ggk_base, keys, cols_d, ggk_sm, ggk_sd, M, d, WHOLE)  # [C, D]
    v = load_tile(v_base, keys, cols_e, v_sm, v_se, M, e, WHOLE)  # [C, SLAB]
    ggv = load_tile(ggv_base, keys, cols_e, ggv_sm, ggv_se, M, e, WHOLE)  # [C, SLAB]
    s = dot(q, tl.trans(k), None, LOGITS)  # [R, C]
    s = masked(s, heads, mask, batch, rows[:, None], keys[None, :], scale, N, M, CAUSAL)
    p = probabilities(s, top, log_total, scale_log2, keys, M, WHOLE)  # [R, C]
    return keys, k, ggk, v, ggv, p


@triton.jit
def attention_bwd_bwd_rows_kernel(
    ggq_ptr, ggk_ptr, ggv_ptr, do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, stats_ptr,
    sums_ptr, g_do_ptr, gq_ptr,
    ggq_sb, ggq_sn, ggq_sd, ggk_sb, ggk_sm, ggk_sd, ggv_sb, ggv_sm, ggv_se, do_sb, do_sn, do_se,
    q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se, o_sb, o_sn, o_se,
    g_do_sb, g_do_sn, g_do_se, gq_sb, gq_sn, gq_sd,
    N, M, d, e, scale, plane, heads, mask, sinks,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SLAB: tl.constexpr, PRECISION: tl.constexpr,
    LOGITS: tl.constexpr, QK: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr = False, UNIT: tl.constexpr = 1,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    d, e = multiple(d, UNIT), multiple(e, UNIT)
    ggq_sb, ggq_sn = multiple(ggq_sb, UNIT), multiple(ggq_sn, UNIT)
    ggk_sb, ggk_sm = multiple(ggk_sb, UNIT), multiple(ggk_sm, UNIT)
    ggv_sb, ggv_sm = multiple(ggv_sb, UNIT), multiple(ggv_sm, UNIT)
    do_sb, do_sn = multiple(do_sb, UNIT), multiple(do_sn, UNIT)
    q_sb, q_sn = multiple(q_sb, UNIT), multiple(q_sn, UNIT)
    k_sb, k_sm = multiple(k_sb, UNIT), multiple(k_sm, UNIT)
    v_sb, v_sm = multiple(v_sb, UNIT), multiple(v_sm, UNIT)
    o_sb, o_sn = multiple(o_sb, UNIT), multiple(o_sn, UNIT)
    g_do_sb, g_do_sn = multiple(g_do_sb, UNIT), multiple(g_do_sn, UNIT)
    gq_sb, gq_sn = multiple(gq_sb, UNIT), multiple(gq_sn, UNIT)
    blocks = tl.cdiv(N, R)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    scale_log2 = scale * LOG2E
    image = batch
    if heads is not None:
        H, group, ggq_sh, ggk_sh, ggv_sh, do_sh, q_sh, k_sh, v_sh, o_sh, g_do_sh, gq_sh = heads
        image, head, key_head = batch // H, batch % H, batch % H // group
        ggq_ptr += head * ggq_sh
        ggk_ptr += key_head * ggk_sh
        ggv_ptr += key_head * ggv_sh
        do_ptr += head * do_sh
        q_ptr += head * q_sh
        k_ptr += key_head * k_sh
        v_ptr += key_head * v_sh
        o_ptr += head * o_sh
        g_do_ptr += head * g_do_sh
        gq_ptr += head * gq_sh
        scale_log2 = LOG2E
    cols_d, cols_e = tl.arange(0, D), tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    k_base, v_base, do_base = k_ptr + image * k_sb, v_ptr + image * v_sb, do_ptr + image * do_sb
    ggk_base, ggv_base = ggk_ptr + image * ggk_sb, ggv_ptr + image * ggv_sb
    HALF: tl.constexpr = o_ptr.dtype.element_ty != tl.float32  # O is rounded, and delta with it

    q = load_tile(q_ptr + image * q_sb, rows, cols_d, q_sn, q_sd, N, d)  # [R, D]
    ggq = load_tile(ggq_ptr + image * ggq_sb, rows, cols_d, ggq_sn, ggq_sd, N, d)  # [R, D]
    top, log_total = row_stats(stats_ptr + batch * N, rows, N, plane)
    sums = sums_ptr + batch * N + rows
    # Entries that a thread has are summed in the loops, [R, 8], and threads add up theirs at the end.
    a_parts = tl.zeros([R, 8], tl.float32)  # rowsum(A * P)
    a_sink = tl.zeros([R], tl.float32)
    sink = tl.zeros([R], tl.float32)
    if sinks is not None:  # one more key, with c = -delta and no value
        sinks_base, gg_sinks_base = sinks
        sink += sink_share(sinks_base + head, top, log_total)
        a_sink += sink * tl.load(gg_sinks_base + head)
    if QK:
        do = load_tile(do_base, rows, cols_e, do_sn, do_se, N, e)  # [R, SLAB]
        delta = row_delta(do_base, o_ptr + image * o_sb, rows, do_sn, do_se, o_sn, o_se, N, e, E, SLAB)
    if V:
        g_do = tl.zeros([R, SLAB], tl.float32)
    if V and not HALF:
        # One walk, as O is exact enough for E V = (P * A) V - a O. Of A its mean over the first keys is subtracted, so
        # that less cancels.
        first = tl.arange(0, C)
        mean_key = tl.sum(load_tile(k_base, first, cols_d, k_sm, k_sd, M, d), 0) / tl.minimum(C, M)
        mean_ggk = tl.sum(load_tile(ggk_base, first, cols_d, ggk_sm, ggk_sd, M, d), 0) / tl.minimum(C, M)
        mean_a = tl.sum(ggq * mean_key[None, :] + q * mean_ggk[None, :], 1) * scale
        for start in range(0, end_of_keys(M, blocks, R, CAUSAL), C):
            keys, k, ggk, v, ggv, p = load_keys(
                start, q, rows, top, log_total, k_base, k_sm, k_sd, ggk_base, ggk_sm, ggk_sd, v_base, v_sm, v_se,
                ggv_base, ggv_sm, ggv_se, cols_d, cols_e, heads, mask, batch, scale, scale_log2, N, M, d, e,
                C, LOGITS, CAUSAL, WHOLE,
            )  # fmt: skip
            g_do = dot_of_map(p, ggv, g_do, PRECISION)
            a_map = dot(ggq, tl.trans(k), None, PRECISION)
            a_map = dot(q, tl.trans(ggk), a_map, PRECISION) * scale - mean_a[:, None]
            pa = p * a_map
            a_parts += eighths(pa)
            g_do = dot_of_map(pa, v, g_do, PRECISION)
        o = load_tile(o_ptr + image * o_sb, rows, cols_e, o_sn, o_se, N, e)  # [R, SLAB]
        a_row = tl.sum(a_parts, 1) + a_sink - sink * mean_a
        g_do -= a_row[:, None] * o
        a_row += mean_a
        if tl.program_id(1) == 0:
            tl.store(sums + plane, a_row, mask=rows < N)
    elif QK and HALF:
        pc_parts = tl.zeros([R, 8], tl.float32)  # rowsum(P * c), the rounding of delta
        b_parts = tl.zeros([R, 8], tl.float32)  # rowsum(P * B)
        for start in range(0, end_of_keys(M, blocks, R, CAUSAL), C):
            keys, k, ggk, v, ggv, p = load_keys(
                start, q, rows, top, log_total, k_base, k_sm, k_sd, ggk_base, ggk_sm, ggk_sd, v_base, v_sm, v_se,
                ggv_base, ggv_sm, ggv_se, cols_d, cols_e, heads, mask, batch, scale, scale_log2, N, M, d, e,
                C, LOGITS, CAUSAL, WHOLE,
            )  # fmt: skip
            a_map = dot(ggq, tl.trans(k), None, PRECISION)
            a_map = dot(q, tl.trans(ggk), a_map, PRECISION) * scale
            a_parts += eighths(p * a_map)
            dp = dot(do, tl.trans(v), None, PRECISION)
            dp = other_slabs(dp, do_base, rows, do_sn, do_se, N, v_base, keys, v_sm, v_se, M, e, E, SLAB, PRECISION)
            c = dp - delta[:, None]
            pc_parts += eighths(p * c)
            h = dot(do, tl.trans(ggv), None, PRECISION)
            h = other_slabs(h, do_base, rows, do_sn, do_se, N, ggv_base, keys, ggv_sm, ggv_se, M, e, E, SLAB, PRECISION)
            b_parts += eighths(p * (a_map * c + h))
        a_row = tl.sum(a_parts, 1) + a_sink
        pc_row = tl.sum(pc_parts, 1) - sink * delta
        b_row = tl.sum(b_parts, 1) - a_sink * delta - pc_row * a_row
        delta += pc_row
        tl.store(sums + plane, a_row, mask=rows < N)
    else:
        a_row = tl.load(sums + plane, mask=rows < N, other=0.0)
    if QK:
        if V and not HALF:  # rowsum(P * B) = rowsum(dO * g_dO)
            b_row = tl.sum(do * g_do, 1)
        elif not HALF:
            g_do_base = g_do_ptr + image * g_do_sb
            b_row = row_delta(do_base, g_do_base, rows, do_sn, do_se, g_do_sn, g_do_se, N, e, E, SLAB)
        tl.store(sums, delta, mask=rows < N)
        tl.store(sums + 2 * plane, b_row, mask=rows < N)
        gq = tl.zeros([R, D], tl.float32)

    if QK or HALF:
        for start in range(0, end_of_keys(M, blocks, R, CAUSAL), C):
            keys, k, ggk, v, ggv, p = load_keys(
                start, q, rows, top, log_total, k_base, k_sm, k_sd, ggk_base, ggk_sm, ggk_sd, v_base, v_sm, v_se,
                ggv_base, ggv_sm, ggv_se, cols_d, cols_e, heads, mask, batch, scale, scale_log2, N, M, d, e,
                C, LOGITS, CAUSAL, WHOLE,
            )  # fmt: skip
            a_map = dot(ggq, tl.trans(k), None, PRECISION)
            a_map = dot(q, tl.trans(ggk), a_map, PRECISION) * scale - a_row[:, None]
            if HALF and V:
                g_do = dot_of_map(narrow(p, ggv.dtype), ggv, g_do, PRECISION)
                g_do = dot_of_map(narrow(p * a_map, v.dtype), v, g_do, PRECISION)
            if QK:
                dp = dot(do, tl.trans(v), None, PRECISION)
                dp = other_slabs(dp, do_base, rows, do_sn, do_se, N, v_base, keys, v_sm, v_se, M, e, E, SLAB, PRECISION)
                c = dp - delta[:, None]
                gq = dot_of_map(narrow(p * c, ggk.dtype), ggk, gq, PRECISION)
                b_map = dot(do, tl.trans(ggv), a_map * c - b_row[:, None], PRECISION)
                b_map = other_slabs(
                    b_map, do_base, rows, do_sn, do_se, N, ggv_base, keys, ggv_sm, ggv_se, M, e, E, SLAB, PRECISION
                )
                gq = dot_of_map(narrow(p * b_map, k.dtype), k, gq, PRECISION)
    if V:
        store_tile(g_do_ptr + image * g_do_sb, g_do, rows, cols_e, g_do_sn, g_do_se, N, e)
    if QK:
        store_tile(gq_ptr + image * gq_sb, gq * scale, rows, cols_d, gq_sn, gq_sd, N, d)


@triton.jit
def attention_bwd_bwd_keys_kernel(
    ggq_ptr, ggk_ptr, ggv_ptr, do_ptr, q_ptr, k_ptr, v_ptr, stats_ptr,
    sums_ptr, gk_ptr, gv_ptr,
    ggq_sb, ggq_sn, ggq_sd, ggk_sb, ggk_sm, ggk_sd, ggv_sb, ggv_sm, ggv_se, do_sb, do_sn, do_se,
    q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se,
    gk_sb, gk_sm, gk_sd, gv_sb, gv_sm, gv_se,
    N, M, d, e, scale, plane, heads, mask,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SLAB: tl.constexpr, PRECISION: tl.constexpr,
    LOGITS: tl.constexpr, QK: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr = False,
    UNIT: tl.constexpr = 1, WHOLE: tl.constexpr = False,
):  # fmt: skip
    d, e = multiple(d, UNIT), multiple(e, UNIT)
    ggq_sb, ggq_sn = multiple(ggq_sb, UNIT), multiple(ggq_sn, UNIT)
    ggk_sb, ggk_sm = multiple(ggk_sb, UNIT), multiple(ggk_sm, UNIT)
    ggv_sb, ggv_sm = multiple(ggv_sb, UNIT), multiple(ggv_sm, UNIT)
    do_sb, do_sn = multiple(do_sb, UNIT), multiple(do_sn, UNIT)
    q_sb, q_sn = multiple(q_sb, UNIT), multiple(q_sn, UNIT)
    k_sb, k_sm = multiple(k_sb, UNIT), multiple(k_sm, UNIT)
    v_sb, v_sm = multiple(v_sb, UNIT), multiple(v_sm, UNIT)
    gk_sb, gk_sm = multiple(gk_sb, UNIT), multiple(gk_sm, UNIT)
    gv_sb, gv_sm = multiple(gv_sb, UNIT), multiple(gv_sm, UNIT)
    blocks = tl.cdiv(M, C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    keys = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    scale_log2 = scale * LOG2E
    image = batch
    if heads is not None:
        H, group, ggq_sh, ggk_sh, ggv_sh, do_sh, q_sh, k_sh, v_sh, gk_sh, gv_sh = heads
        image, head, key_head = batch // H, batch % H, batch % H // group
        ggq_ptr += head * ggq_sh
        ggk_ptr += key_head * ggk_sh
        ggv_ptr += key_head * ggv_sh
        do_ptr += head * do_sh
        q_ptr += head * q_sh
        k_ptr += key_head * k_sh
        v_ptr += key_head * v_sh
        gk_ptr += head * gk_sh
        gv_ptr += head * gv_sh
        scale_log2 = LOG2E
    if PARTS > 1:  # each part of the rows writes sums of its own, to be added up
        gk_ptr += tl.program_id(2).to(tl.int64) * (plane // N) * M * d
        gv_ptr += tl.program_id(2).to(tl.int64) * (plane // N) * M * e
    cols_d, cols_e = tl.arange(0, D), tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    q_base, ggq_base, do_base = q_ptr + image * q_sb, ggq_ptr + image * ggq_sb, do_ptr + image * do_sb
    v_base, ggv_base = v_ptr + image * v_sb, ggv_ptr + image * ggv_sb

    k = load_tile(k_ptr + image * k_sb, keys, cols_d, k_sm, k_sd, M, d)  # [C, D]
    ggk = load_tile(ggk_ptr + image * ggk_sb, keys, cols_d, ggk_sm, ggk_sd, M, d)  # [C, D]
    if QK:
        v = load_tile(v_base, keys, cols_e, v_sm, v_se, M, e)  # [C, SLAB]
        ggv = load_tile(ggv_base, keys, cols_e, ggv_sm, ggv_se, M, e)  # [C, SLAB]
        gk = tl.zeros([C, D], tl.float32)
    if V:
        gv = tl.zeros([C, SLAB], tl.float32)
    begin, end = rows_of_part(N, blocks, R, C, PARTS, CAUSAL)
    for start in range(begin, end, R):
        rows = start + tl.arange(0, R)
        q = load_tile(q_base, rows, cols_d, q_sn, q_sd, N, d, WHOLE)  # [R, D]
        ggq = load_tile(ggq_base, rows, cols_d, ggq_sn, ggq_sd, N, d, WHOLE)  # [R, D]
        do = load_tile(do_base, rows, cols_e, do_sn, do_se, N, e, WHOLE)  # [R, SLAB]
        top, log_total = row_stats(stats_ptr + batch * N, rows, N, plane, WHOLE)
        sums = sums_ptr + batch * N
        a_row = load_rows(sums + plane, rows, N, WHOLE)
        s = dot(k, tl.trans(q), None, LOGITS)  # [C, R]
        s = masked(s, heads, mask, batch, rows[None, :], keys[:, None], scale, N, M, CAUSAL)
        p = tl.exp2((s - top[None, :]) * scale_log2 - log_total[None, :])
        a_map = dot(k, tl.trans(ggq), None, PRECISION)
        a_map = dot(ggk, tl.trans(q), a_map, PRECISION) * scale - a_row[None, :]
        if V:
            gv = dot_of_map(narrow(p * a_map, do.dtype), do, gv, PRECISION)
        if QK:
            delta = load_rows(sums, rows, N, WHOLE)
            b_row = load_rows(sums + 2 * plane, rows, N, WHOLE)
            dp = dot(v, tl.trans(do), None, PRECISION)
            dp = other_slabs(dp, v_base, keys, v_sm, v_se, M, do_base, rows, do_sn, do_se, N, e, E, SLAB, PRECISION)
            c = dp - delta[None, :]
            gk = dot_of_map(narrow(p * c, ggq.dtype), ggq, gk, PRECISION)
            b_map = dot(ggv, tl.trans(do), a_map * c - b_row[None, :], PRECISION)
            b_map = other_slabs(
                b_map, ggv_base, keys, ggv_sm, ggv_se, M, do_base, rows, do_sn, do_se, N, e, E, SLAB, PRECISION
            )
            gk = dot_of_map(narrow(p * b_map, q.dtype), q, gk, PRECISION)
    if QK:
        store_tile(gk_ptr + image * gk_sb, gk * scale, keys, cols_d, gk_sm, gk_sd, M, d)
    if V:
        store_tile(gv_ptr + image * gv_sb, gv, keys, cols_e, gv_sm, gv_se, M, e)
