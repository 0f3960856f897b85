"""Kernel and launcher of the output projection with its residual: x is read once and the sum written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgan._layout import image_like, rows_of
from fastgan.kernels.attention.tiles import load_tile, store_tile
from fastgan.kernels.device import on_its_device
from fastgan.kernels.precision import conv_precision, dot
from fastgan.kernels.projection_config import CHUNK, NUM_STAGES, block_for

PIXELS = 64


@on_its_device
def projection_residual_fwd(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """As :func:`fastgan.reference.projections.projection_residual_fwd`."""
    (b, n, e), outputs = rows.shape, weight.shape[0]
    x_rows, y = rows_of(x), image_like(x)
    y_rows = rows_of(y)
    if y.numel():
        out, num_warps = block_for(outputs, weight.itemsize)
        grid = (b * triton.cdiv(n, PIXELS) * triton.cdiv(outputs, out),)
        projection_residual_fwd_kernel[grid](
            rows, weight, weight if bias is None else bias, x_rows, y_rows,
            *rows.stride(), *weight.stride(), *x_rows.stride(), *y_rows.stride(),
            n, e, outputs, P=PIXELS, OUT=out, CHUNK=CHUNK, BIAS=bias is not None,
            PRECISION=conv_precision(weight.dtype), num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
    return y


@triton.jit
def projection_residual_fwd_kernel(
    rows_ptr, w_ptr, bias_ptr, x_ptr, y_ptr,
    rows_sb, rows_sn, rows_se, w_so, w_se, x_sb, x_sn, x_sc, y_sb, y_sn, y_sc,
    N, e, outputs,
    P: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs of the same pixels come one after the other, so that their rows are read from device memory once.
    slabs, strips = tl.cdiv(outputs, OUT), tl.cdiv(N, P)
    cols = tl.program_id(0) % slabs * OUT + tl.arange(0, OUT)
    pixels = tl.program_id(0) // slabs % strips * P + tl.arange(0, P)
    batch = (tl.program_id(0) // (slabs * strips)).to(tl.int64)

    acc = tl.zeros([P, OUT], tl.float32)
    for start in range(0, e, CHUNK):
        ins = start + tl.arange(0, CHUNK)
        w = load_tile(w_ptr, ins, cols, w_se, w_so, e, outputs)  # [CHUNK, OUT]
        tile = load_tile(rows_ptr + batch * rows_sb, pixels, ins, rows_sn, rows_se, N, e)  # [P, CHUNK]
        acc = dot(tile, w, acc, PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < outputs, other=0.0).to(tl.float32)[None, :]
    acc += load_tile(x_ptr + batch * x_sb, pixels, cols, x_sn, x_sc, N, outputs).to(tl.float32)
    store_tile(y_ptr + batch * y_sb, acc, pixels, cols, y_sn, y_sc, N, outputs)
