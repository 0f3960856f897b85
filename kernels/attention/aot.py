"""What ahead-of-time compilation needs to know of the attention kernels: the signatures that the launchers produce."""

from __future__ import annotations

import itertools

import torch

from fastgan.kernels.aot import AotCase
from fastgan.kernels.attention.config import Launch, entries, most_qk
from fastgan.kernels.attention.double_backward import attention_bwd_bwd_keys_kernel, attention_bwd_bwd_rows_kernel
from fastgan.kernels.attention.kernels import attention_bwd_keys_kernel, attention_bwd_rows_kernel, attention_fwd_kernel

KERNELS = {
    "fwd": attention_fwd_kernel,
    "bwd_rows": attention_bwd_rows_kernel,
    "bwd_keys": attention_bwd_keys_kernel,
    "bwd_bwd_rows": attention_bwd_bwd_rows_kernel,
    "bwd_bwd_keys": attention_bwd_bwd_keys_kernel,
}
_FLOAT32_POINTERS = {"stats_ptr", "delta_ptr", "sums_ptr"}
_POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_CHANNEL_STRIDES = ("_sd", "_se")
_ROW_STRIDES = ("_sn", "_sm")


def aot_cases(capability: int) -> list[AotCase]:
    """Every entry of the table for ``capability``, at the most channels that it serves, in float16 and float32.

    Operands are contiguous along channels; on sm_90 also along rows, as channels-first models have them.
    """
    cases = []
    layouts = (_CHANNEL_STRIDES, _ROW_STRIDES) if capability == 90 else (_CHANNEL_STRIDES,)
    for kernel, e, launch, dtype in entries(capability):
        precision = "tf32" if dtype == torch.float16 else "ieee" if launch.scalar else "tf32x3"
        for outputs, units in itertools.product(output_sets(kernel, launch, e), layouts):
            cases.append(case(kernel, most_qk(kernel, dtype.itemsize, e), e, launch, dtype, outputs, precision, units))
    return cases


def output_sets(kernel: str, launch: Launch, e: int) -> list[dict[str, bool]]:
    """The QK and V that are launched, for kernels that take them."""
    takes_flags = "QK" in KERNELS[kernel].arg_names
    return [outputs for outputs, _ in launch.passes(e)] if takes_flags else [{}]


def case(
    kernel: str,
    d: int,
    e: int,
    launch: Launch,
    dtype: torch.dtype,
    outputs: dict[str, bool],
    precision: str = "tf32",
    unit_strides: tuple[str, str] = _CHANNEL_STRIDES,
) -> AotCase:
    """One launch, for operands whose strides of these names are 1."""
    function = KERNELS[kernel]
    constexprs: dict[str, object] = {
        "R": launch.rows,
        "C": launch.keys,
        "D": d,
        "E": e,
        "SLAB": launch.slab,
        "PRECISION": precision,
        "LOGITS": "tf32x3" if precision == "ieee" else precision,
        **outputs,
    }
    constexprs = {name: value for name, value in constexprs.items() if name in function.arg_names}
    constexprs |= {name: 1 for name in function.arg_names if name.endswith(unit_strides)}
    signature = {n: _type(n, dtype) for n in function.arg_names if n not in constexprs}
    flags = " ".join(name for name, value in outputs.items() if value)
    flags += " channels-first" if unit_strides == _ROW_STRIDES else ""
    label = f"{_POINTER[dtype][1:]} {precision} D={d} E={e} slab={launch.slab} {launch.rows}x{launch.keys} {flags}"
    return AotCase(
        kernel=function,
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        label=label.strip(),
        divisible=tuple(name for name, kind in signature.items() if kind != "fp32"),
        mma=precision != "ieee",
    )


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument.endswith("_ptr"):
        return "*fp32" if argument in _FLOAT32_POINTERS else _POINTER[dtype]
    return "fp32" if argument == "scale" else "i32"
