"""Precision of matrix products in kernels, which follows torch's own setting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan.backend import interpreting

# "highest" asks for float32 products: three TF32 products on the tensor cores keep about 22 of the 24 bits of the
# mantissa and are several times faster than the scalar units.
_FLOAT32 = {"highest": "tf32x3", "high": "tf32x3", "medium": "tf32"}
# Triton's interpreter multiplies the raw bits of bfloat16 matrices, and truncates to bfloat16; hardware rounds.
INTERPRETING = tl.constexpr(interpreting())


def input_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for operands of ``dtype``.

    Follows ``torch.get_float32_matmul_precision()``, as torch's own matmul does.
    """
    return _FLOAT32[_matmul_precision()] if dtype == torch.float32 else "tf32"


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch.backends.cuda.matmul.fp32_precision, which that function refuses to read
        return "medium" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def conv_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for kernels that replace a convolution: torch's setting for cuDNN."""
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "tf32x3"  # type: ignore[attr-defined]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32; ``acc`` may be None."""
    if a.dtype == tl.float32 and PRECISION == "tf32x3":
        return _dot_of_parts(a, b, acc)
    if INTERPRETING and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_of_map(p, x, acc, PRECISION: tl.constexpr):
    """acc + p x for a map p that is itself the result of a product.

    A thread holds entries 2 t and 2 t + 1 of each eight of such a result's row, but t and t + 4 of a TF32 operand's.
    In the order of the sum that makes these the same entries, p need not be exchanged between threads. Products of
    fewer than 64 rows, which wgmma does not take, would need more registers for it.
    """
    if p.dtype == tl.float32 and PRECISION != "ieee" and p.shape[0] >= 64:
        EIGHTS: tl.constexpr = p.shape[1] // 8
        p = p.reshape(p.shape[0], EIGHTS, 4, 2).trans(0, 1, 3, 2).reshape(p.shape[0], p.shape[1])
        x = x.reshape(EIGHTS, 4, 2, x.shape[1]).trans(0, 2, 1, 3).reshape(x.shape[0], x.shape[1])
    return dot(p, x, acc, PRECISION)


@triton.jit
def _dot_of_parts(a, b, acc):
    """Three products of TF32 parts, the small ones first, summed apart from ``acc``, since tensor cores truncate sums.

    Triton's own "tf32x3" also truncates the parts, which are rounded here, and is several times less accurate.
    """
    a_high, b_high = _tf32(a), _tf32(b)
    product = tl.dot(_tf32(a - a_high), b_high, input_precision="tf32")
    product = tl.dot(a_high, _tf32(b - b_high), product, input_precision="tf32")
    product = tl.dot(a_high, b_high, product, input_precision="tf32")
    return product if acc is None else acc + product


@triton.jit
def _tf32(x):
    """x rounded to the 11 bits of a TF32 number's mantissa."""
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in ``DTYPE``, rounded to nearest even."""
    if INTERPRETING and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(DTYPE)
