"""Device functions shared by the attention kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.kernels.precision import dot, narrow

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """Return x, and let the compiler know that it is a multiple of UNIT: Triton itself only notices multiples of 16."""
    return x // UNIT * UNIT


@triton.jit
def load_tile(base, rows, cols, stride_row, stride_col, n_rows, n_cols, WHOLE: tl.constexpr = False):
    """Load base[rows, cols], zero outside n_rows x n_cols. All rows are inside if WHOLE."""
    pointers = base + rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    inside = cols[None, :] < n_cols
    if not WHOLE:
        inside = (rows[:, None] < n_rows) & inside
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_rows(base, rows, n_rows, WHOLE: tl.constexpr = False):
    """Load base[rows], one number of each row, zero from n_rows on. All rows are before it if WHOLE."""
    if WHOLE:
        return tl.load(base + rows)
    return tl.load(base + rows, mask=rows < n_rows, other=0.0)


@triton.jit
def store_tile(base, tile, rows, cols, stride_row, stride_col, n_rows, n_cols):
    """Store the part of base[rows, cols] that lies within n_rows x n_cols."""
    pointers = base + rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    tl.store(pointers, narrow(tile, base.dtype.element_ty), mask=mask)


@triton.jit
def row_stats(base, rows, N, plane, WHOLE: tl.constexpr = False):
    """The largest logit of each row, and log2(sum(exp(scale (logit - largest))))."""
    return load_rows(base, rows, N, WHOLE), load_rows(base + plane, rows, N, WHOLE) * LOG2E


@triton.jit
def masked(s, heads, mask, batch, rows, keys, scale, N, M, CAUSAL: tl.constexpr):
    """Logits s, unchanged for one unmasked head; with several heads multiplied by ``scale``, and -inf if masked."""
    if heads is not None:
        s = s * scale
        if mask is not None:
            base, stride_image, stride_head, stride_row, stride_key = mask
            base += batch // heads[0] * stride_image + batch % heads[0] * stride_head
            pointers = base + rows.to(tl.int64) * stride_row + keys.to(tl.int64) * stride_key
            given = tl.load(pointers, mask=(rows < N) & (keys < M), other=0)
            if base.dtype.element_ty == tl.int1:
                s = tl.where(given, s, float("-inf"))
            else:
                s += given.to(tl.float32)
        if CAUSAL:
            s = tl.where(keys <= rows, s, float("-inf"))
    return s


@triton.jit
def probabilities(s, top, log_total, scale_log2, keys, M, WHOLE: tl.constexpr):
    """P of logits s [R, C]; 0 for keys past M, of which there are none if the tiles are WHOLE."""
    p = tl.exp2((s - top[:, None]) * scale_log2 - log_total[:, None])
    if not WHOLE:
        p = tl.where(keys[None, :] < M, p, 0.0)
    return p


@triton.jit
def eighths(x):
    """Sums over every eighth entry of the rows of x [R, C]: [R, 8]. A thread has all terms of each if x is a product's
    result."""
    return tl.sum(x.reshape(x.shape[0], x.shape[1] // 8, 8), 1)


@triton.jit
def end_of_keys(M, blocks, R: tl.constexpr, CAUSAL: tl.constexpr):
    """The end of the keys that a program with R rows sees."""
    if CAUSAL:
        M = tl.minimum(M, (tl.program_id(0) % blocks + 1) * R)
    return M


@triton.jit
def rows_of_part(N, blocks, R: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr):
    """The start of the first tile of rows, and the end of the last, that the program walks over: those of its part of
    the rows that see any of its C keys."""
    begin, end = 0, N
    if PARTS > 1:
        size = tl.cdiv(tl.cdiv(N, R), PARTS) * R
        begin, end = tl.program_id(2) * size, tl.minimum(N, (tl.program_id(2) + 1) * size)
    if CAUSAL:
        begin = tl.maximum(begin, tl.program_id(0) % blocks * C // R * R)
    return begin, end


@triton.jit
def sink_share(sink_ptr, top, log_total):
    """The probability of a head's sink in each row."""
    return tl.exp2((tl.load(sink_ptr) - top) * LOG2E - log_total)


@triton.jit
def row_delta(do_base, o_base, rows, do_sn, do_se, o_sn, o_se, N, e, E: tl.constexpr, SLAB: tl.constexpr):
    """rowsum(dO * O)."""
    delta = tl.zeros(rows.shape, tl.float32)
    for start in range(0, E, SLAB):
        cols = start + tl.arange(0, SLAB)
        do = load_tile(do_base, rows, cols, do_sn, do_se, N, e).to(tl.float32)
        delta += tl.sum(do * load_tile(o_base, rows, cols, o_sn, o_se, N, e).to(tl.float32), 1)
    return delta


@triton.jit
def other_slabs(
    acc, x_base, x_rows, x_sn, x_se, x_n, y_base, y_rows, y_sn, y_se, y_n, e,
    E: tl.constexpr, SLAB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x y^T over the channels past the first slab, which stays on chip; the others are loaded for each tile."""
    # A loop bounded by a constant is unrolled, which is quicker; float32 proper has no registers for that.
    end = e if PRECISION == "ieee" else E
    for start in range(SLAB, end, SLAB):
        cols = start + tl.arange(0, SLAB)
        x = load_tile(x_base, x_rows, cols, x_sn, x_se, x_n, e)
        y = load_tile(y_base, y_rows, cols, y_sn, y_se, y_n, e)
        acc = dot(x, tl.trans(y), acc, PRECISION)
    return acc
