"""What ahead-of-time compilation needs to know of the attention kernels: the signatures that the launchers produce."""

from __future__ import annotations

import torch

from fastgan.kernels.aot import AotCase
from fastgan.kernels.attention_bwd_bwd_kernels import attention_bwd_bwd_keys_kernel, attention_bwd_bwd_rows_kernel
from fastgan.kernels.attention_config import Launch, entries
from fastgan.kernels.attention_kernels import attention_bwd_keys_kernel, attention_bwd_rows_kernel, attention_fwd_kernel

KERNELS = {
    "fwd": attention_fwd_kernel,
    "bwd_rows": attention_bwd_rows_kernel,
    "bwd_keys": attention_bwd_keys_kernel,
    "bwd_bwd_rows": attention_bwd_bwd_rows_kernel,
    "bwd_bwd_keys": attention_bwd_bwd_keys_kernel,
}
_FLOAT32_POINTERS = {"stats_ptr", "delta_ptr", "sums_ptr"}
_POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_CHANNEL_STRIDES, _PIXEL_STRIDES = ("_sd", "_se"), ("_sn", "_sm")


def aot_cases(capability: int) -> list[AotCase]:
    """Every entry of the table for ``capability``, at the largest channels it serves, in float16 and float32."""
    cases = []
    for kernel, d, e, launch, dtype in entries(capability):
        for outputs in output_sets(kernel, launch, e):
            cases.append(case(kernel, d, e, launch, dtype, outputs))
    return cases


def output_sets(kernel: str, launch: Launch, e: int) -> list[dict[str, bool]]:
    """The QK and V that are launched."""
    if kernel in ("fwd", "bwd_rows"):
        return [{}]
    if launch.slab >= e:
        return [{"QK": True, "V": True}]
    return [{"QK": True, "V": False}, {"QK": False, "V": True}]


def case(
    kernel: str,
    d: int,
    e: int,
    launch: Launch,
    dtype: torch.dtype,
    outputs: dict[str, bool],
    channels_last: bool = True,
    precision: str | None = None,
) -> AotCase:
    """One launch, for operands that are contiguous along channels, or along pixels where not ``channels_last``."""
    function = KERNELS[kernel]
    constexprs: dict[str, object] = {
        "R": launch.rows,
        "C": launch.keys,
        "D": d,
        "E": e,
        "SLAB": launch.slab,
        "PRECISION": precision or ("tf32x3" if dtype == torch.float32 else "tf32"),
        **outputs,
    }
    constexprs = {name: value for name, value in constexprs.items() if name in function.arg_names}
    unit_strides = _CHANNEL_STRIDES if channels_last else _PIXEL_STRIDES
    constexprs |= {name: 1 for name in function.arg_names if name.endswith(unit_strides)}
    signature = {n: _type(n, dtype) for n in function.arg_names if n not in constexprs}
    flags = " ".join(name for name, value in outputs.items() if value)
    return AotCase(
        kernel=function,
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        label=f"{_POINTER[dtype][1:]} D={d} E={e} slab={launch.slab} {launch.rows}x{launch.keys} {flags}".strip(),
        divisible=tuple(name for name, kind in signature.items() if kind != "fp32"),
        mma=True,
    )


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument.endswith("_ptr"):
        return "*fp32" if argument in _FLOAT32_POINTERS else _POINTER[dtype]
    return "fp32" if argument == "scale" else "i32"
