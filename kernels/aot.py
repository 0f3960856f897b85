"""Compile kernels for GPUs that are not in this machine, and read what they use: registers, spills, shared memory, MMA.

Triton ships ptxas and cuobjdump, so neither a GPU nor a driver is needed. Triton's interpreter must be off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
# Shared memory a block may use, and registers and threads of a multiprocessor (CUDA programming guide, compute
# capabilities).
SHARED_PER_BLOCK = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_PER_MULTIPROCESSOR = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS_PER_MULTIPROCESSOR = 65536
WARPS_PER_MULTIPROCESSOR = 64
MOST_SPILLS = 32
"""Bytes of local memory that a kernel may have outside its loops: some releases of Triton put 8 or 16 there."""
_MMA = ("wgmma", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True)
class AotCase:
    """One configuration that can be launched: signature and constexprs by argument name."""

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    label: str
    divisible: tuple[str, ...] = field(default=())  # arguments that the launcher finds to be multiples of 16
    mma: bool = False  # the dtype allows matrix instructions, so there must be some


@dataclass(frozen=True)
class Report:
    """Resources that one case uses when compiled for one architecture.

    ``spills`` counts bytes of local memory and stack, ``loop_spills`` accesses to it inside a loop.
    """

    kernel: str
    label: str
    capability: int
    registers: int
    spills: int
    loop_spills: int
    shared: int
    mma: tuple[str, ...]
    num_warps: int
    occupancy: float

    def violations(self, case: AotCase) -> list[str]:
        """Why this case must not be launched on this architecture; empty when all is well."""
        found = []
        if self.loop_spills:
            found.append(f"{self.loop_spills} accesses to local memory in a loop")
        if self.spills > MOST_SPILLS:
            found.append(f"{self.spills} bytes of local memory")
        if self.shared > SHARED_PER_BLOCK[self.capability]:
            found.append(f"{self.shared} bytes of shared memory")
        if case.mma and not self.mma:
            found.append("no matrix instructions")
        return [f"{self.kernel} {self.label} sm_{self.capability}: {what}" for what in found]


def compile_case(case: AotCase, capability: int) -> Report:
    """Compile ``case`` for compute capability ``capability`` (80, 90, 100)."""
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    attributes = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constexprs), attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Report(
        kernel=case.kernel.__name__,
        label=case.label,
        capability=capability,
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        loop_spills=_loop_spills(compiled.asm["cubin"]) if usage["STACK"] + usage["LOCAL"] else 0,
        shared=compiled.metadata.shared,
        mma=tuple(name for name in _MMA if name in compiled.asm["ptx"]),
        num_warps=case.num_warps,
        occupancy=_occupancy(usage["REG"], compiled.metadata.shared, case.num_warps, capability),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    output = _cuobjdump(cubin, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}


def _loop_spills(cubin: bytes) -> int:
    return accesses_in_loops(_cuobjdump(cubin, "--dump-sass"))


def accesses_in_loops(sass: str) -> int:
    """Count the accesses to local memory between a backward branch and its target, in disassembled machine code."""
    instructions = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)]
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    spills = (address for address, text in instructions if re.search(r"\b(LDL|STL)\b", text))
    return sum(any(begin <= address <= end for begin, end in loops) for address in spills)


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _occupancy(registers: int, shared: int, num_warps: int, capability: int) -> float:
    """Share of a multiprocessor's warps that can be resident, limited by registers and shared memory."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out to a warp in units of 256
    blocks = min(
        REGISTERS_PER_MULTIPROCESSOR // (per_warp * num_warps),
        SHARED_PER_MULTIPROCESSOR[capability] // (shared + 1024),
        WARPS_PER_MULTIPROCESSOR // num_warps,
    )
    return blocks * num_warps / WARPS_PER_MULTIPROCESSOR
