"""Fused attention: forward, backward and double backward, each streaming over tiles, none with an N x M map in memory.

Launches: 1 forward, 2 backward, 2 double backward. In the kernels that own rows of queries a program walks over the keys; in
those that own keys it walks over the queries, so that every output is summed by one program in a fixed order: deterministic,
no atomics. Shapes in comments: R query rows and C keys of a tile, D and E the padded channels of q/k and of v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels.attention_config import MAX_E, MAX_QK, Launch, launch_for, padded
from fastgan.kernels.precision import dot, input_precision
from fastgan.layout import empty_rows_like

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(base, rows, cols, stride_row, stride_col, n_rows, n_cols):
    """Load base[rows, cols], zero outside n_rows x n_cols."""
    pointers = base + rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    return tl.load(pointers, mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols), other=0.0)


@triton.jit
def _store_tile(base, tile, rows, cols, stride_row, stride_col, n_rows, n_cols):
    """Store the part of base[rows, cols] that lies within n_rows x n_cols."""
    pointers = base + rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _row_stats(base, rows, N, plane):
    """The largest logit of each row, and log2(sum(exp(scale (logit - largest))))."""
    top = tl.load(base + rows, mask=rows < N, other=0.0)
    return top, tl.load(base + plane + rows, mask=rows < N, other=0.0) * LOG2E


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, stats_ptr,
    q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se, o_sb, o_sn, o_se,
    N, M, d, e, scale, plane,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, R)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    k_base, v_base = k_ptr + batch * k_sb, v_ptr + batch * v_sb
    scale_log2 = scale * LOG2E  # scale >= 0, so that the largest logit stays the largest

    q = _tile(q_ptr + batch * q_sb, rows, cols_d, q_sn, q_sd, N, d)  # [R, D]
    top = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, E], tl.float32)
    for start in range(0, M, C):
        keys = start + tl.arange(0, C)
        k = _tile(k_base, keys, cols_d, k_sm, k_sd, M, d)  # [C, D]
        s = dot(q, tl.trans(k), None, PRECISION)  # [R, C]
        s = tl.where(keys[None, :] < M, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2((s - new_top[:, None]) * scale_log2)
        shrink = tl.exp2((top - new_top) * scale_log2)
        total = total * shrink + tl.sum(p, 1)
        v = _tile(v_base, keys, cols_e, v_sm, v_se, M, e)  # [C, E]
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        top = new_top
    _store_tile(o_ptr + batch * o_sb, acc / total[:, None], rows, cols_e, o_sn, o_se, N, e)
    stats = stats_ptr + batch * N + rows
    tl.store(stats, top, mask=rows < N)
    tl.store(stats + plane, tl.log(total), mask=rows < N)


@triton.jit
def attention_bwd_rows_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, stats_ptr, delta_ptr, dq_ptr,
    do_sb, do_sn, do_se, q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se, o_sb, o_sn, o_se, dq_sb, dq_sn, dq_sd,
    N, M, d, e, scale, plane,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, R)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    scale_log2 = scale * LOG2E
    k_base, v_base = k_ptr + batch * k_sb, v_ptr + batch * v_sb

    q = _tile(q_ptr + batch * q_sb, rows, cols_d, q_sn, q_sd, N, d)  # [R, D]
    do = _tile(do_ptr + batch * do_sb, rows, cols_e, do_sn, do_se, N, e)  # [R, E]
    o = _tile(o_ptr + batch * o_sb, rows, cols_e, o_sn, o_se, N, e)  # [R, E]
    top, log_total = _row_stats(stats_ptr + batch * N, rows, N, plane)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + batch * N + rows, delta, mask=rows < N)
    dq = tl.zeros([R, D], tl.float32)
    for start in range(0, M, C):
        keys = start + tl.arange(0, C)
        k = _tile(k_base, keys, cols_d, k_sm, k_sd, M, d)  # [C, D]
        v = _tile(v_base, keys, cols_e, v_sm, v_se, M, e)  # [C, E]
        s = dot(q, tl.trans(k), None, PRECISION)  # [R, C]
        p = tl.exp2((s - top[:, None]) * scale_log2 - log_total[:, None])
        p = tl.where(keys[None, :] < M, p, 0.0)
        dp = dot(do, tl.trans(v), None, PRECISION)  # [R, C]
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    _store_tile(dq_ptr + batch * dq_sb, dq * scale, rows, cols_d, dq_sn, dq_sd, N, d)


@triton.jit
def attention_bwd_keys_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr,
    do_sb, do_sn, do_se, q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se,
    dk_sb, dk_sm, dk_sd, dv_sb, dv_sm, dv_se,
    N, M, d, e, scale, plane,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    keys = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    scale_log2 = scale * LOG2E
    q_base, do_base = q_ptr + batch * q_sb, do_ptr + batch * do_sb

    k = _tile(k_ptr + batch * k_sb, keys, cols_d, k_sm, k_sd, M, d)  # [C, D]
    v = _tile(v_ptr + batch * v_sb, keys, cols_e, v_sm, v_se, M, e)  # [C, E]
    dk = tl.zeros([C, D], tl.float32)
    dv = tl.zeros([C, E], tl.float32)
    for start in range(0, N, R):
        rows = start + tl.arange(0, R)
        q = _tile(q_base, rows, cols_d, q_sn, q_sd, N, d)  # [R, D]
        do = _tile(do_base, rows, cols_e, do_sn, do_se, N, e)  # [R, E]
        top, log_total = _row_stats(stats_ptr + batch * N, rows, N, plane)
        delta = tl.load(delta_ptr + batch * N + rows, mask=rows < N, other=0.0)
        s = dot(k, tl.trans(q), None, PRECISION)  # [C, R]
        p = tl.exp2((s - top[None, :]) * scale_log2 - log_total[None, :])
        dv = dot(p.to(do.dtype), do, dv, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)  # [C, R]
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    _store_tile(dk_ptr + batch * dk_sb, dk * scale, keys, cols_d, dk_sm, dk_sd, M, d)
    _store_tile(dv_ptr + batch * dv_sb, dv, keys, cols_e, dv_sm, dv_se, M, e)


@triton.jit
def attention_bwd_bwd_rows_kernel(
    ggq_ptr, ggk_ptr, ggv_ptr, do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, stats_ptr,
    sums_ptr, g_do_ptr, gq_ptr,
    ggq_sb, ggq_sn, ggq_sd, ggk_sb, ggk_sm, ggk_sd, ggv_sb, ggv_sm, ggv_se, do_sb, do_sn, do_se,
    q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se, o_sb, o_sn, o_se,
    g_do_sb, g_do_sn, g_do_se, gq_sb, gq_sn, gq_sd,
    N, M, d, e, scale, plane,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, R)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    scale_log2 = scale * LOG2E
    k_base, v_base = k_ptr + batch * k_sb, v_ptr + batch * v_sb
    ggk_base, ggv_base = ggk_ptr + batch * ggk_sb, ggv_ptr + batch * ggv_sb

    q = _tile(q_ptr + batch * q_sb, rows, cols_d, q_sn, q_sd, N, d)  # [R, D]
    ggq = _tile(ggq_ptr + batch * ggq_sb, rows, cols_d, ggq_sn, ggq_sd, N, d)  # [R, D]
    do = _tile(do_ptr + batch * do_sb, rows, cols_e, do_sn, do_se, N, e)  # [R, E]
    o = _tile(o_ptr + batch * o_sb, rows, cols_e, o_sn, o_se, N, e)  # [R, E]
    top, log_total = _row_stats(stats_ptr + batch * N, rows, N, plane)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)

    a_row = tl.zeros([R], tl.float32)  # rowsum(A * P)
    pac_row = tl.zeros([R], tl.float32)  # rowsum(P * A * c)
    ph_row = tl.zeros([R], tl.float32)  # rowsum(P * (dO ggv^T))
    for start in range(0, M, C):
        keys = start + tl.arange(0, C)
        k = _tile(k_base, keys, cols_d, k_sm, k_sd, M, d)  # [C, D]
        ggk = _tile(ggk_base, keys, cols_d, ggk_sm, ggk_sd, M, d)  # [C, D]
        s = dot(q, tl.trans(k), None, PRECISION)  # [R, C]
        p = tl.exp2((s - top[:, None]) * scale_log2 - log_total[:, None])
        p = tl.where(keys[None, :] < M, p, 0.0)
        a_map = dot(ggq, tl.trans(k), None, PRECISION)
        a_map = dot(q, tl.trans(ggk), a_map, PRECISION) * scale
        pa = p * a_map
        a_row += tl.sum(pa, 1)
        v = _tile(v_base, keys, cols_e, v_sm, v_se, M, e)  # [C, E]
        dp = dot(do, tl.trans(v), None, PRECISION)
        pac_row += tl.sum(pa * (dp - delta[:, None]), 1)
        ggv = _tile(ggv_base, keys, cols_e, ggv_sm, ggv_se, M, e)  # [C, E]
        h = dot(do, tl.trans(ggv), None, PRECISION)
        ph_row += tl.sum(p * h, 1)
    b_row = pac_row - delta * a_row + ph_row  # rowsum(P * B)
    sums = sums_ptr + batch * N + rows
    tl.store(sums, delta, mask=rows < N)
    tl.store(sums + plane, a_row, mask=rows < N)
    tl.store(sums + 2 * plane, b_row, mask=rows < N)

    g_do = tl.zeros([R, E], tl.float32)
    gq = tl.zeros([R, D], tl.float32)
    for start in range(0, M, C):
        keys = start + tl.arange(0, C)
        k = _tile(k_base, keys, cols_d, k_sm, k_sd, M, d)  # [C, D]
        ggk = _tile(ggk_base, keys, cols_d, ggk_sm, ggk_sd, M, d)  # [C, D]
        v = _tile(v_base, keys, cols_e, v_sm, v_se, M, e)  # [C, E]
        ggv = _tile(ggv_base, keys, cols_e, ggv_sm, ggv_se, M, e)  # [C, E]
        s = dot(q, tl.trans(k), None, PRECISION)  # [R, C]
        p = tl.exp2((s - top[:, None]) * scale_log2 - log_total[:, None])
        p = tl.where(keys[None, :] < M, p, 0.0)
        g_do = dot(p.to(ggv.dtype), ggv, g_do, PRECISION)
        a_map = dot(ggq, tl.trans(k), None, PRECISION)
        a_map = dot(q, tl.trans(ggk), a_map, PRECISION) * scale
        g_do = dot((p * (a_map - a_row[:, None])).to(v.dtype), v, g_do, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        c = dp - delta[:, None]
        gq = dot((p * c).to(ggk.dtype), ggk, gq, PRECISION)
        b_map = dot(do, tl.trans(ggv), a_map * c - dp * a_row[:, None], PRECISION)
        gq = dot((p * (b_map - b_row[:, None])).to(k.dtype), k, gq, PRECISION)
    _store_tile(g_do_ptr + batch * g_do_sb, g_do, rows, cols_e, g_do_sn, g_do_se, N, e)
    _store_tile(gq_ptr + batch * gq_sb, gq * scale, rows, cols_d, gq_sn, gq_sd, N, d)


@triton.jit
def attention_bwd_bwd_keys_kernel(
    ggq_ptr, ggk_ptr, ggv_ptr, do_ptr, q_ptr, k_ptr, v_ptr, stats_ptr,
    sums_ptr, gk_ptr, gv_ptr,
    ggq_sb, ggq_sn, ggq_sd, ggk_sb, ggk_sm, ggk_sd, ggv_sb, ggv_sm, ggv_se, do_sb, do_sn, do_se,
    q_sb, q_sn, q_sd, k_sb, k_sm, k_sd, v_sb, v_sm, v_se,
    gk_sb, gk_sm, gk_sd, gv_sb, gv_sm, gv_se,
    N, M, d, e, scale, plane,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    keys = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    scale_log2 = scale * LOG2E
    q_base, ggq_base, do_base = q_ptr + batch * q_sb, ggq_ptr + batch * ggq_sb, do_ptr + batch * do_sb

    k = _tile(k_ptr + batch * k_sb, keys, cols_d, k_sm, k_sd, M, d)  # [C, D]
    ggk = _tile(ggk_ptr + batch * ggk_sb, keys, cols_d, ggk_sm, ggk_sd, M, d)  # [C, D]
    v = _tile(v_ptr + batch * v_sb, keys, cols_e, v_sm, v_se, M, e)  # [C, E]
    ggv = _tile(ggv_ptr + batch * ggv_sb, keys, cols_e, ggv_sm, ggv_se, M, e)  # [C, E]
    gk = tl.zeros([C, D], tl.float32)
    gv = tl.zeros([C, E], tl.float32)
    for start in range(0, N, R):
        rows = start + tl.arange(0, R)
        inside = rows < N
        q = _tile(q_base, rows, cols_d, q_sn, q_sd, N, d)  # [R, D]
        ggq = _tile(ggq_base, rows, cols_d, ggq_sn, ggq_sd, N, d)  # [R, D]
        do = _tile(do_base, rows, cols_e, do_sn, do_se, N, e)  # [R, E]
        top, log_total = _row_stats(stats_ptr + batch * N, rows, N, plane)
        sums = sums_ptr + batch * N + rows
        delta = tl.load(sums, mask=inside, other=0.0)
        a_row = tl.load(sums + plane, mask=inside, other=0.0)
        b_row = tl.load(sums + 2 * plane, mask=inside, other=0.0)
        s = dot(k, tl.trans(q), None, PRECISION)  # [C, R]
        p = tl.exp2((s - top[None, :]) * scale_log2 - log_total[None, :])
        a_map = dot(k, tl.trans(ggq), None, PRECISION)
        a_map = dot(ggk, tl.trans(q), a_map, PRECISION) * scale
        gv = dot((p * (a_map - a_row[None, :])).to(do.dtype), do, gv, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)
        c = dp - delta[None, :]
        gk = dot((p * c).to(ggq.dtype), ggq, gk, PRECISION)
        b_map = dot(ggv, tl.trans(do), a_map * c - dp * a_row[None, :], PRECISION)
        gk = dot((p * (b_map - b_row[None, :])).to(q.dtype), q, gk, PRECISION)
    _store_tile(gk_ptr + batch * gk_sb, gk * scale, keys, cols_d, gk_sm, gk_sd, M, d)
    _store_tile(gv_ptr + batch * gv_sb, gv, keys, cols_e, gv_sm, gv_se, M, e)


def check_supported(d: int, e: int) -> None:
    """Raise ``ValueError`` for channel counts the kernels are not compiled for."""
    if d > MAX_QK:
        raise ValueError(f"q must have at most {MAX_QK} channels for impl='triton', got {d}")
    if e > MAX_E:
        raise ValueError(f"v must have at most {MAX_E} channels for impl='triton', got {e}")


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As :func:`fastgan.reference.attention.attention_fwd`."""
    (b, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    o, stats = empty_rows_like(q, e), q.new_empty(2, b, n, dtype=torch.float32)
    if o.numel():
        launch = launch_for("fwd", d, e, q.dtype)
        attention_fwd_kernel[(triton.cdiv(n, launch.rows) * b,)](
            q, k, v, o, stats, *_strides(q, k, v, o), n, m, d, e, scale, b * n, **_options(launch, d, e, q.dtype)
        )  # fmt: skip
    return o, stats


def attention_bwd(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastgan.reference.attention.attention_bwd`."""
    (b, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    if not b * n:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = stats.new_empty(b, n)
    launch = launch_for("bwd_rows", d, e, q.dtype)
    attention_bwd_rows_kernel[(triton.cdiv(n, launch.rows) * b,)](
        grad_o, q, k, v, o, stats, delta, dq, *_strides(grad_o, q, k, v, o, dq),
        n, m, d, e, scale, b * n, **_options(launch, d, e, q.dtype)
    )  # fmt: skip
    launch = launch_for("bwd_keys", d, e, q.dtype)
    attention_bwd_keys_kernel[(triton.cdiv(m, launch.keys) * b,)](
        grad_o, q, k, v, stats, delta, dk, dv, *_strides(grad_o, q, k, v, dk, dv),
        n, m, d, e, scale, b * n, **_options(launch, d, e, q.dtype)
    )  # fmt: skip
    return dq, dk, dv


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
    launch = launch_for("bwd_bwd_rows", d, e, q.dtype)
    attention_bwd_bwd_rows_kernel[(triton.cdiv(n, launch.rows) * b,)](
        ggq, ggk, ggv, grad_o, q, k, v, o, stats, sums, g_do, gq, *strides, *_strides(o, g_do, gq),
        n, m, d, e, scale, b * n, **_options(launch, d, e, q.dtype)
    )  # fmt: skip
    launch = launch_for("bwd_bwd_keys", d, e, q.dtype)
    attention_bwd_bwd_keys_kernel[(triton.cdiv(m, launch.keys) * b,)](
        ggq, ggk, ggv, grad_o, q, k, v, stats, sums, gk, gv, *strides, *_strides(gk, gv),
        n, m, d, e, scale, b * n, **_options(launch, d, e, q.dtype)
    )  # fmt: skip
    return g_do, gq, gk, gv


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()]


def _options(launch: Launch, d: int, e: int, dtype: torch.dtype) -> dict[str, int | str]:
    return {
        "R": launch.rows,
        "C": launch.keys,
        "D": padded(d),
        "E": padded(e),
        "PRECISION": input_precision(dtype),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
