"""Kernel and launcher of the pooled projection: queries, keys and values of a feature map in one pass over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._layout import rows_of
from fastgan.kernels.attention.tiles import load_tile, store_tile
from fastgan.kernels.device import on_its_device
from fastgan.kernels.precision import conv_precision, dot, narrow
from fastgan.kernels.projection_config import CHUNK, NUM_STAGES, across, block_for


@on_its_device
def pooled_projection_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastgan.reference.pooled_projection.pooled_projection_fwd`."""
    b, channels, height, width = x.shape
    outputs = weight.shape[0]
    rows = rows_of(x)
    q = weight.new_empty(b, height * width, d)
    kv = weight.new_empty(b, (height // 2) * (width // 2), outputs - d)
    index = torch.empty_like(kv, dtype=torch.int8)
    if x.numel():
        t, (out, num_warps) = across(width, weight.itemsize), block_for(outputs, weight.itemsize)
        grid = (b * triton.cdiv(height, 2) * triton.cdiv(width, t) * triton.cdiv(outputs, out),)
        pooled_projection_fwd_kernel[grid](
            rows, weight, weight if bias is None else bias, q, kv, index, *rows.stride(), *weight.stride(),
            height, width, channels, d, outputs, T=t, OUT=out, CHUNK=CHUNK, BIAS=bias is not None,
            PRECISION=conv_precision(weight.dtype), num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
    return q, kv, index


@triton.jit
def pooled_projection_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, q_ptr, kv_ptr, index_ptr,
    x_sb, x_sn, x_sc, w_so, w_sc,
    H, W, channels, d, outputs,
    T: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program owns T neighbouring pixels of two image rows and OUT outputs. Programs of the same pixels come one after
    # the other, so that x is read from device memory once.
    slabs, strips = tl.cdiv(outputs, OUT), tl.cdiv(W, T)
    cols = tl.program_id(0) % slabs * OUT + tl.arange(0, OUT)
    strip = tl.program_id(0) // slabs % strips * T
    pair = tl.program_id(0) // (slabs * strips) % tl.cdiv(H, 2)
    batch = (tl.program_id(0) // (slabs * strips * tl.cdiv(H, 2))).to(tl.int64)

    left = strip + tl.arange(0, T)
    top_base = x_ptr + batch * x_sb + (2 * pair * W).to(tl.int64) * x_sn
    bottom_base = top_base + W.to(tl.int64) * x_sn
    bottom_width = tl.where(2 * pair + 1 < H, W, 0)  # an odd last row has no partner
    top = tl.zeros([T, OUT], tl.float32)
    bottom = tl.zeros([T, OUT], tl.float32)
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

    upper_left, upper_right = _neighbours(top, T, OUT)  # [T / 2, OUT]
    lower_left, lower_right = _neighbours(bottom, T, OUT)
    largest, index = upper_left, tl.zeros([T // 2, OUT], tl.int8)
    largest, index = _larger(largest, index, upper_right, 1)
    largest, index = _larger(largest, index, lower_left, 2)
    largest, index = _larger(largest, index, lower_right, 3)
    keys = strip // 2 + tl.arange(0, T // 2)
    n_keys = tl.where(2 * pair + 1 < H, W // 2, 0)
    first = (batch * (H // 2) + pair) * (W // 2) * (outputs - d)
    pooled = cols - d
    mask = (keys[:, None] < n_keys) & (pooled[None, :] >= 0) & (cols[None, :] < outputs)
    offsets = first + keys[:, None].to(tl.int64) * (outputs - d) + pooled[None, :]
    tl.store(kv_ptr + offsets, narrow(largest, kv_ptr.dtype.element_ty), mask=mask)
    tl.store(index_ptr + offsets, index, mask=mask)


@triton.jit
def _neighbours(tile, T: tl.constexpr, OUT: tl.constexpr):
    """The even and the odd rows of [T, OUT]."""
    return tl.split(tl.permute(tl.reshape(tile, [T // 2, 2, OUT]), [0, 2, 1]))


@triton.jit
def _larger(largest, index, candidate, position: tl.constexpr):
    """As max_pool2d: the first of equals wins, NaN wins over all."""
    wins = (candidate > largest) | (candidate != candidate)
    return tl.where(wins, candidate, largest), tl.where(wins, position, index).to(tl.int8)
