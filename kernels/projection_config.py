"""Tiles of the two projection kernels, and what ahead-of-time compilation needs to know of them.

Both move far more bytes than they multiply, so a tile need only be large enough to read whole cache lines and to
keep its sums in registers: at most 64 pixels x 128 outputs x 2 image rows over 8 warps is 64 sums a thread. float32
operands are split into three TF32 parts, which leaves registers for a quarter of that.
"""

from __future__ import annotations

import itertools

CHUNK = 32  # input channels of a step
NUM_STAGES = 2


def across(width: int, itemsize: int) -> int:
    """Neighbouring pixels of a tile for images of ``width``; 16 at least, as the matrix units demand."""
    return min(64 if itemsize == 2 else 32, max(16, 1 << (width - 1).bit_length()))


def block_for(outputs: int, itemsize: int) -> tuple[int, int]:
    """Outputs of a tile and the warps for them, for weights of ``itemsize`` bytes."""
    most = 128 if itemsize == 2 else 64
    # On sm_100 some releases of Triton keep local memory in the loop of a float32 tile of 16 outputs.
    least = 16 if itemsize == 2 else 32
    out = min(most, max(least, 1 << (outputs - 1).bit_length()))
    return out, 8 if out == most else 4


def aot_cases(capability: int) -> list:
    """Every tile in float16 and float32, x channels-first and channels-last, float32 x under float16 weights."""
    del capability
    from fastgan.kernels.pooled_projection import pooled_projection_fwd_kernel
    from fastgan.kernels.projections import PIXELS, projection_residual_fwd_kernel

    cases = []
    tiles = (16, 32, 64, 128)
    for (weight, x), layout, outputs in itertools.product(
        (("*fp16", "*fp16"), ("*fp32", "*fp32"), ("*fp16", "*fp32")), ("_sn", "_sc"), tiles
    ):
        if outputs > 64 and weight == "*fp32":
            continue
        widest = across(64, 2 if weight == "*fp16" else 4)
        for kernel, pixels in ((pooled_projection_fwd_kernel, widest), (projection_residual_fwd_kernel, PIXELS)):
            cases.append(_case(kernel, pixels, weight, x, layout, outputs))
    return cases


def _case(kernel, pixels: int, weight: str, x: str, layout: str, outputs: int):
    from fastgan.kernels.aot import AotCase

    out, num_warps = block_for(outputs, 2 if weight == "*fp16" else 4)
    precision = "tf32" if weight == "*fp16" else "tf32x3"
    sizes = {"T": pixels, "P": pixels, "OUT": out, "CHUNK": CHUNK, "BIAS": True, "PRECISION": precision}
    constexprs = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    constexprs |= {
        name: 1 for name in kernel.arg_names if name in (f"x{layout}", f"y{layout}", "w_sc", "w_se", "rows_se")
    }
    pointers = {"x_ptr": x, "y_ptr": x, "index_ptr": "*i8"}
    signature = {
        name: pointers.get(name, weight) if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
        if name not in constexprs
    }
    label = (
        f"{weight[1:]} x={x[1:]} {precision} {'channels-first' if layout == '_sn' else 'channels-last'} {pixels}x{out}"
    )
    return AotCase(kernel, signature, constexprs, num_warps, NUM_STAGES, label, tuple(signature), mma=True)
