"""Compile kernels for GPUs that are not in this machine, and read their use of registers, shared memory and MMA.

Triton ships ptxas and the tools that read its output, so neither a GPU nor a driver is needed. Triton's interpreter
must be off.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgan.kernels.attention import double_backward
from fastgan.kernels.attention import kernels as attention
from fastgan.kernels.attention.config import Operands, Tile, launches
from fastgan.kernels.launch import Configuration, Launch
from fastgan.kernels.machine_code import MOST_LOCAL, MOST_LOCAL_OF_HEADS, local_memory_in_loops, resource_usage
from fastgan.kernels.projections import pooled_projection_fwd_kernel, projection_residual_fwd_kernel, tile_for
from fastgan.kernels.spectral_norm import kernels as spectral_norm
from fastgan.kernels.spectral_norm.launch import COMBINE_BLOCKS, DOTS_BLOCKS, S_BLOCKS, T_BLOCKS, TL_DTYPES
from fastgan.kernels.spectral_norm.plan import TILES

ARCHITECTURES = (80, 90, 100)
# Shared memory a block may use, and registers and threads of a multiprocessor (CUDA programming guide, compute
# capabilities).
SHARED_PER_BLOCK = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_PER_MULTIPROCESSOR = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS_PER_MULTIPROCESSOR = 65536
WARPS_PER_MULTIPROCESSOR = 64
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_MMA = ("wgmma", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True)
class AotCase:
    """One configuration that can be launched: signature and constexprs by argument name."""

    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    config: Configuration
    label: str
    divisible: tuple[str, ...] = field(default=())  # arguments that the launcher finds to be multiples of 16
    mma: bool = False  # the dtype allows matrix instructions, so there must be some
    most_local: int = MOST_LOCAL  # bytes of local memory outside loops
    variant: bool = False  # another case has the same tile, for more outputs or for another dtype or layout


@dataclass(frozen=True)
class Report:
    """The resources of one case compiled for one architecture.

    ``local`` counts bytes of local memory and stack, ``local_in_loops`` the instructions in loops that use them.
    """

    kernel: str
    label: str
    capability: int
    registers: int
    local: int
    local_in_loops: int
    shared: int
    mma: tuple[str, ...]
    num_warps: int
    occupancy: float

    def violations(self, case: AotCase) -> list[str]:
        """Return why this case must not be launched on this architecture; nothing if it may."""
        found = []
        if self.local_in_loops:
            found.append(f"{self.local_in_loops} accesses to local memory in a loop")
        if self.local > case.most_local:
            found.append(f"{self.local} bytes of local memory")
        if self.shared > SHARED_PER_BLOCK[self.capability]:
            found.append(f"{self.shared} bytes of shared memory")
        if case.mma and not self.mma:
            found.append("no matrix instructions")
        return [f"{self.kernel} {self.label} sm_{self.capability}: {what}" for what in found]


def case_of(launch: Launch, label: str = "") -> AotCase:
    """Return the specialization that Triton compiles for ``launch``: its divisibilities by 16 and its ones."""
    signature: dict[str, Any] = {}
    constexprs = dict(launch.constants)
    divisible = []
    for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):  # constants come after
        if value is None:
            constexprs[name] = None
            continue
        if isinstance(value, tuple):  # its entries as they are in the worst case
            signature[name] = tuple(_POINTERS[x.dtype] if isinstance(x, Tensor) else "i32" for x in value)
            multiple = False
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            multiple = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], multiple = "fp32", False
        elif value == 1:
            constexprs[name] = 1
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            multiple = value % 16 == 0
        if multiple:
            divisible.append(name)
    label = label or str(launch.config)
    most = MOST_LOCAL_OF_HEADS if "heads" in signature else MOST_LOCAL
    return AotCase(launch.kernel, signature, constexprs, launch.config, label, tuple(divisible), most_local=most)


def compile_for(case: AotCase, capability: int) -> Any:
    """Compile ``case`` for compute capability ``capability`` (80, 90, 100): Triton's compiled kernel."""
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    attributes = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constexprs), attrs=attributes)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_case(case: AotCase, capability: int) -> Report:
    """Compile ``case`` for compute capability ``capability`` (80, 90, 100) and report its resources."""
    return report_of(case, compile_for(case, capability), capability)


def report_of(case: AotCase, compiled: Any, capability: int) -> Report:
    """Return the resources of ``case``, which was compiled for ``capability``."""
    usage = resource_usage(compiled.asm["cubin"])
    local = usage["STACK"] + usage["LOCAL"]
    return Report(
        kernel=case.kernel.__name__,
        label=case.label,
        capability=capability,
        registers=usage["REG"],
        local=local,
        local_in_loops=local_memory_in_loops(compiled.asm["cubin"]) if local else 0,
        shared=compiled.metadata.shared,
        mma=tuple(name for name in _MMA if name in compiled.asm["ptx"]),
        num_warps=case.config.num_warps,
        occupancy=resident(usage["REG"], compiled.metadata.shared, case.config.num_warps, capability)
        * case.config.num_warps
        / WARPS_PER_MULTIPROCESSOR,
    )


def resident(registers: int, shared: int, num_warps: int, capability: int) -> int:
    """Return how many programs a multiprocessor holds at once, limited by registers, shared memory and warps."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out to a warp in units of 256
    return min(
        REGISTERS_PER_MULTIPROCESSOR // (per_warp * num_warps),
        SHARED_PER_MULTIPROCESSOR[capability] // (shared + 1024),
        WARPS_PER_MULTIPROCESSOR // num_warps,
    )


@functools.cache
def cases(op: str, capability: int, rows: bool = False) -> tuple[AotCase, ...]:
    """Return every configuration of ``op`` (a key of :data:`OPS`) that can be launched on ``capability``.

    With ``rows`` variants are left out: each row of a table is there once.
    """
    return tuple(case for case in OPS[op](capability) if not (rows and case.variant))


ATTENTION_KERNELS = {
    "fwd": attention.attention_fwd_kernel,
    "bwd_rows": attention.attention_bwd_rows_kernel,
    "bwd_keys": attention.attention_bwd_keys_kernel,
    "bwd_bwd_rows": double_backward.attention_bwd_bwd_rows_kernel,
    "bwd_bwd_keys": double_backward.attention_bwd_bwd_keys_kernel,
}
_BEYOND = ("heads", "mask", "sinks")
_CHANNEL_STRIDES = ("_sd", "_se")


def _attention(capability: int) -> Iterator[AotCase]:
    """Yield every entry of the tables, at the most channels that it serves, in bfloat16 and float32.

    Operands are contiguous along channels. Outputs as wide as v that have a launch of their own, in the tile of the one
    before it, are a variant.
    """
    for kind in get_args(Operands):
        before = None
        for kernel, d, e, one, dtype in launches(capability, kind):
            precision = "tf32" if dtype == torch.bfloat16 else "ieee" if one.tile.scalar else "tf32x3"
            case = attention_case(kernel, d, e, one.tile, dtype, one.outputs, precision, kind)
            yield replace(case, variant=one.outputs.get("QK") is False and one.tile == before)
            before = one.tile


def attention_case(
    kernel: str,
    d: int,
    e: int,
    tile: Tile,
    dtype: torch.dtype,
    outputs: dict[str, bool],
    precision: str = "tf32",
    kind: Operands = "single",
) -> AotCase:
    """Return one launch, for operands that are contiguous along channels and whose rows are multiples of 16.

    Of heads it is the one that takes most: under a causal mask and, if ``masked``, an additive one, with sinks.
    """
    heads = kind != "single"
    function = ATTENTION_KERNELS[kernel]
    logits = "tf32x3" if precision == "ieee" else precision
    constants = {
        **tile.constants(),
        "D": d,
        "E": e,
        "PRECISION": precision,
        "LOGITS": logits,
        "PARTS": 1,
        "WHOLE": False,
    }
    constants |= outputs
    constexprs = {name: value for name, value in constants.items() if name in function.arg_names}
    constexprs |= {name: 1 for name in function.arg_names if name.endswith(_CHANNEL_STRIDES)}
    absent = {"single": ("heads", "mask", "sinks"), "heads": ("mask",), "masked": ()}[kind]
    beyond = [name for name in absent if name in function.arg_names]
    constexprs |= {**dict.fromkeys(beyond), "CAUSAL": heads, "UNIT": 16}
    floats: dict[str, Any] = {"scale": "fp32", "stats_ptr": "*fp32", "delta_ptr": "*fp32", "sums_ptr": "*fp32"}
    floats |= {
        "heads": ("i32",) * (2 + sum(name.endswith("_sb") for name in function.arg_names)),
        "mask": (_POINTERS[dtype], *("i32",) * 4),
        "sinks": ("*fp32", "*fp32") if kernel == "bwd_bwd_rows" else "*fp32",
    }
    signature: dict[str, Any] = {
        name: floats.get(name, _POINTERS[dtype] if name.endswith("_ptr") else "i32")
        for name in function.arg_names
        if name not in constexprs
    }
    label = f"{_POINTERS[dtype][1:]} {precision} D={d} E={e} slab={tile.slab} {tile}"
    label = " ".join([label, *(name for name, value in outputs.items() if value)])
    label += f" {kind}" if heads else ""
    divisible = tuple(name for name, kind in signature.items() if kind != "fp32" and name not in _BEYOND)
    most = MOST_LOCAL_OF_HEADS if heads else MOST_LOCAL
    return AotCase(function, signature, constexprs, tile, label, divisible, precision != "ieee", most)


def _projections(_capability: int) -> Iterator[AotCase]:
    """Yield every tile in float16 and float32, x channels-first and channels-last, float32 x under float16 weights.

    The first of these layouts, with x in the dtype of the weights, stands for the others.
    """
    dtypes = (("*fp16", "*fp16"), ("*fp32", "*fp32"), ("*fp16", "*fp32"))
    for (weight, x), layout, outputs in itertools.product(dtypes, ("_sn", "_sc"), (16, 32, 64, 128)):
        itemsize = 2 if weight == "*fp16" else 4
        if outputs > tile_for(64, outputs, itemsize).outputs:
            continue
        for kernel, pixels in (
            (pooled_projection_fwd_kernel, 64 if itemsize == 2 else 32),
            (projection_residual_fwd_kernel, 64),
        ):
            tile = tile_for(pixels, outputs, itemsize)
            precision = "tf32" if itemsize == 2 else "tf32x3"
            constexprs = {**tile.constants(), "BIAS": True, "PRECISION": precision}
            units = (f"x{layout}", f"y{layout}", "w_sc", "w_se", "rows_se")
            constexprs |= {name: 1 for name in kernel.arg_names if name in units}
            pointers = {"x_ptr": x, "y_ptr": x, "index_ptr": "*i8"}
            signature = {
                name: pointers.get(name, weight) if name.endswith("_ptr") else "i32"
                for name in kernel.arg_names
                if name not in constexprs
            }
            memory = "channels-first" if layout == "_sn" else "channels-last"
            label = f"{weight[1:]} x={x[1:]} {precision} {memory} {tile}"
            variant = layout != "_sn" or x != weight
            yield AotCase(kernel, signature, constexprs, tile, label, tuple(signature), mma=True, variant=variant)


def _spectral_norm(_capability: int) -> Iterator[AotCase]:
    """Yield all launches for weights of each dtype and, beside them, outputs or gradients of each dtype.

    Those that are float32 or bfloat16 throughout stand for the others.
    """
    types = {
        **dict.fromkeys(("pointers", "geometry"), "*i64"),
        "tiles": "*i32",
        **dict.fromkeys(("partials", "dots", "u_flat", "v_flat", "sigma"), "*fp32"),
        **{"n_layers": "i32", "n_tiles": "i32", "eps": "fp32"},
    }
    for w, x in itertools.product(TL_DTYPES.values(), repeat=2):
        launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []  # kernel, what sets launches apart, sizes
        if w == x:
            launches += [(spectral_norm.spectral_norm_matvec_kernel, {"FROM_LIST": f}, S_BLOCKS) for f in (True, False)]
            for update, first in ((True, True), (False, True), (True, False)):
                flags = {"UPDATE": update, "FROM_LIST": first}
                launches.append((spectral_norm.spectral_norm_matvec_t_kernel, flags, T_BLOCKS))
        for alignment in (1, 16):
            sizes = {"BLOCK": TILES.block_flat, "O_DTYPE": x}
            launches.append((spectral_norm.spectral_norm_scale_kernel, {"ALIGNMENT": alignment}, sizes))
        for double in (False, True):
            flags = {"DOUBLE": double}
            launches.append((spectral_norm.spectral_norm_dots_kernel, flags, {"G_DTYPE": x, **DOTS_BLOCKS}))
            launches.append((spectral_norm.spectral_norm_combine_kernel, flags, {"G_DTYPE": x, **COMBINE_BLOCKS}))
        for kernel, flags, sizes in launches:
            signature = {name: kind for name, kind in types.items() if name in kernel.arg_names}
            label = " ".join([f"{w} {x}", *(f"{name}={value}" for name, value in flags.items())])
            variant = w != x or w == tl.float16
            yield AotCase(kernel, signature, {**flags, "W_DTYPE": w, **sizes}, TILES, label, variant=variant)


OPS = {"attention": _attention, "projection": _projections, "spectral_norm": _spectral_norm}
