"""The projections of an attention block: kernels and launchers.

The pooled projection makes queries, keys and values of a feature map in one pass over it. The output projection reads
x, its residual, once and writes the sum once. Both move far more bytes than they multiply, so a tile need only be large
enough to read whole cache lines and to keep its sums in registers: at most 64 pixels x 128 outputs x 2 image rows over
8 warps is 64 sums per thread. float32 operands are split into three TF32 parts, which leaves registers for a quarter of
that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._layout import image_like, rows_of
from fastgan.kernels.attention.tiles import load_tile, store_tile
from fastgan.kernels.launch import launch, on_its_device
from fastgan.kernels.precision import conv_precision, dot, narrow

CHUNK = 32  # input channels of a step


@dataclass(frozen=True)
class PixelTile:
    """One way to launch a projection: pixels and outputs of a tile."""

    pixels: int
    outputs: int
    num_warps: int
    num_stages: int = 2

    def __str__(self) -> str:
        return f"{self.pixels}x{self.outputs}"

    def constants(self) -> dict[str, int]:
        """Return the constants of the kernels that give the tile's size."""
        return {"PIXELS": self.pixels, "OUT": self.outputs, "CHUNK": CHUNK}

    def smaller(self) -> PixelTile | None:
        """Return a tile of half the outputs, or of half the pixels at 16 outputs; None at the least the units take."""
        if self.outputs > 16:
            return replace(self, outputs=self.outputs // 2)
        return replace(self, pixels=self.pixels // 2) if self.pixels > 16 else None


def tile_for(pixels: int, outputs: int, itemsize: int) -> PixelTile:
    """Return the tile for ``pixels``, and for ``outputs`` by weights of ``itemsize`` bytes."""
    pixels, outputs = (max(16, 1 << (size - 1).bit_length()) for size in (pixels, outputs))  # what matrix units take
    most = 128 if itemsize == 2 else 64
    return PixelTile(pixels, min(outputs, most), 8 if outputs >= most else 4)


@on_its_device
def pooled_projection_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch :func:`fastgan.reference.projections.pooled_projection_fwd`."""
    b, channels, height, width = x.shape
    outputs = weight.shape[0]
    rows = rows_of(x)
    q = weight.new_empty(b, height * width, d)
    kv = weight.new_empty(b, (height // 2) * (width // 2), outputs - d)
    index = torch.empty_like(kv, dtype=torch.int8)
    if x.numel():
        strides = (*rows.stride(), *weight.stride())
        sizes = (height, width, channels, d, outputs)
        launch(
            pooled_projection_fwd_kernel,
            tile_for(min(width, 64 if weight.itemsize == 2 else 32), outputs, weight.itemsize),
            lambda tile: (b * -(-height // 2) * triton.cdiv(width, tile.pixels) * triton.cdiv(outputs, tile.outputs),),
            (rows, weight, weight if bias is None else bias, q, kv, index, *strides, *sizes),
            BIAS=bias is not None,
            PRECISION=conv_precision(weight.dtype),
        )
    return q, kv, index


@on_its_device
def projection_residual_fwd(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Launch :func:`fastgan.reference.projections.projection_residual_fwd`."""
    (b, n, e), outputs = rows.shape, weight.shape[0]
    x_rows, y = rows_of(x), image_like(x)
    y_rows = rows_of(y)
    if y.numel():
        strides = [stride for t in (rows, weight, x_rows, y_rows) for stride in t.stride()]
        launch(
            projection_residual_fwd_kernel,
            tile_for(64, outputs, weight.itemsize),
            lambda tile: (b * triton.cdiv(n, tile.pixels) * triton.cdiv(outputs, tile.outputs),),
            (rows, weight, weight if bias is None else bias, x_rows, y_rows, *strides, n, e, outputs),
            BIAS=bias is not None,
            PRECISION=conv_precision(weight.dtype),
        )
    return y


@triton.jit
def pooled_projection_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, q_ptr, kv_ptr, index_ptr,
    x_sb, x_sn, x_sc, w_so, w_sc,
    H, W, channels, d, outputs,
    PIXELS: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program owns PIXELS neighboring pixels of two image rows and OUT outputs. Programs of the same pixels come one
    # after the other, so that x is read from device memory once.
    slabs, strips = tl.cdiv(outputs, OUT), tl.cdiv(W, PIXELS)
    cols = tl.program_id(0) % slabs * OUT + tl.arange(0, OUT)
    strip = tl.program_id(0) // slabs % strips * PIXELS
    pair = tl.program_id(0) // (slabs * strips) % tl.cdiv(H, 2)
    batch = (tl.program_id(0) // (slabs * strips * tl.cdiv(H, 2))).to(tl.int64)

    left = strip + tl.arange(0, PIXELS)
    top_base = x_ptr + batch * x_sb + (2 * pair * W).to(tl.int64) * x_sn
    bottom_base = top_base + W.to(tl.int64) * x_sn
    bottom_width = tl.where(2 * pair + 1 < H, W, 0)  # an odd last row has no partner
    top = tl.zeros([PIXELS, OUT], tl.float32)
    bottom = tl.zeros([PIXELS, OUT], tl.float32)
    for start in range(0, channels, CHUNK):
        ins = start + tl.arange(0, CHUNK)
        w = load_tile(w_ptr, ins, cols, w_sc, w_so, channels, outputs)  # [CHUNK, OUT]
        top = dot(narrow(load_tile(top_base, left, ins, x_sn, x_sc, W, channels), w.dtype), w, top, PRECISION)
        bottom = dot(
            narrow(load_tile(bottom_base, left, ins, x_sn, x_sc, bottom_width, channels), w.dtype), w, bottom, PRECISION
        )
    if BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < outputs, other=0.0).to(tl.float32)[None, :]
        top += bias
        bottom += bias

    q_base = q_ptr + (batch * H + 2 * pair) * W * d
    store_tile(q_base, top, left, cols, d, 1, W, d)
    store_tile(q_base + W.to(tl.int64) * d, bottom, left, cols, d, 1, bottom_width, d)

    upper_left, upper_right = _neighbors(top, PIXELS, OUT)  # [PIXELS / 2, OUT]
    lower_left, lower_right = _neighbors(bottom, PIXELS, OUT)
    largest, index = upper_left, tl.zeros([PIXELS // 2, OUT], tl.int8)
    largest, index = _larger(largest, index, upper_right, 1)
    largest, index = _larger(largest, index, lower_left, 2)
    largest, index = _larger(largest, index, lower_right, 3)
    keys = strip // 2 + tl.arange(0, PIXELS // 2)
    n_keys = tl.where(2 * pair + 1 < H, W // 2, 0)
    first = (batch * (H // 2) + pair) * (W // 2) * (outputs - d)
    pooled = cols - d
    mask = (keys[:, None] < n_keys) & (pooled[None, :] >= 0) & (cols[None, :] < outputs)
    offsets = first + keys[:, None].to(tl.int64) * (outputs - d) + pooled[None, :]
    tl.store(kv_ptr + offsets, narrow(largest, kv_ptr.dtype.element_ty), mask=mask)
    tl.store(index_ptr + offsets, index, mask=mask)


@triton.jit
def _neighbors(tile, PIXELS: tl.constexpr, OUT: tl.constexpr):
    """The even and the odd rows of [PIXELS, OUT]."""
    return tl.split(tl.permute(tl.reshape(tile, [PIXELS // 2, 2, OUT]), [0, 2, 1]))


@triton.jit
def _larger(largest, index, candidate, position: tl.constexpr):
    """Take the maximum as max_pool2d does: the first of equals wins, and NaN wins over all."""
    wins = (candidate > largest) | (candidate != candidate)
    return tl.where(wins, candidate, largest), tl.where(wins, position, index).to(tl.int8)


@triton.jit
def projection_residual_fwd_kernel(
    rows_ptr, w_ptr, bias_ptr, x_ptr, y_ptr,
    rows_sb, rows_sn, rows_se, w_so, w_se, x_sb, x_sn, x_sc, y_sb, y_sn, y_sc,
    N, e, outputs,
    PIXELS: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs of the same pixels come one after the other, so that their rows are read from device memory once.
    slabs, strips = tl.cdiv(outputs, OUT), tl.cdiv(N, PIXELS)
    cols = tl.program_id(0) % slabs * OUT + tl.arange(0, OUT)
    pixels = tl.program_id(0) // slabs % strips * PIXELS + tl.arange(0, PIXELS)
    batch = (tl.program_id(0) // (slabs * strips)).to(tl.int64)

    acc = tl.zeros([PIXELS, OUT], tl.float32)
    for start in range(0, e, CHUNK):
        ins = start + tl.arange(0, CHUNK)
        w = load_tile(w_ptr, ins, cols, w_se, w_so, e, outputs)  # [CHUNK, OUT]
        tile = load_tile(rows_ptr + batch * rows_sb, pixels, ins, rows_sn, rows_se, N, e)  # [PIXELS, CHUNK]
        acc = dot(tile, w, acc, PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < outputs, other=0.0).to(tl.float32)[None, :]
    acc += load_tile(x_ptr + batch * x_sb, pixels, cols, x_sn, x_sc, N, outputs).to(tl.float32)
    store_tile(y_ptr + batch * y_sb, acc, pixels, cols, y_sn, y_sc, N, outputs)
