"""Model the time that an attention kernel takes on an H100, from its machine code; no GPU is needed.

The model counts the instructions that the loops of the very specialization issue, and divides by what a
multiprocessor's schedulers can issue with the warps that are resident: 0.25 instructions per clock for each warp, at
most 0.7. Matrix instructions also take the time of the matrix units. Beside it stands the floor: the time of the
arithmetic alone, on the padding-free sizes, or of the exponentials if those take longer.

It is a model, not a measurement. It ranks launches of one kernel and finds those that are many times off. It knows
nothing of caches, of latency, of what adds up the parts of a split sum, or of the clock that a chip really holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastgan.kernels.aot import case_of, compile_for, report_of, resident
from fastgan.kernels.attention.launch import Heads, attention_bwd, attention_fwd, bwd_bwd_and_sums
from fastgan.kernels.launch import Launch, recorded
from fastgan.kernels.machine_code import Loop, disassemble, loops

# An H100 SXM (NVIDIA H100 data sheet): multiprocessors, clocks per second under load, schedulers and the number of
# exponentials and of floating-point operations by matrix instructions per clock and multiprocessor.
MULTIPROCESSORS = 132
CLOCK = 1.7e9
SCHEDULERS = 4
EXPONENTIALS = 16
HALF_OPERATIONS = 4096
TF32_OPERATIONS = 2048
# Instructions per clock and scheduler: for each resident warp, and at most.
ISSUE_PER_WARP = 0.25
MOST_ISSUE = 0.7
# A loop of fewer instructions waits for a barrier; it is passed once.
LEAST_LOOP = 8

Shape: TypeAlias = tuple[int, int, int, int, int]
# (B, N, M, d, e) of SelfAttention2d(C) on H x H images: C and H name the row.
SHAPES = {
    "C=64 H=64": (32, 4096, 1024, 8, 32),
    "C=128 H=32": (32, 1024, 256, 16, 64),
    "C=192 H=64": (32, 4096, 1024, 24, 96),
    "C=256 H=64": (32, 4096, 1024, 32, 128),
    "C=384 H=32": (32, 1024, 256, 48, 192),
}
# Unmasked heads of a transformer; B counts the maps of them all.
N_HEADS = 12
HEADS_SHAPES = {"12 heads of 64": (32 * N_HEADS, 1024, 1024, 64, 64)}


@dataclass(frozen=True)
class Cost:
    """The modeled time of one launch.

    Attributes:
        kernel: name of the kernel.
        direction: "forward", "backward" or "double backward".
        tile: the launch's configuration.
        microseconds: modeled time.
        floor: least time that the arithmetic takes, in microseconds.
        registers: of each thread.
        local_in_loops: instructions in loops that use local memory.
        resident: programs that a multiprocessor holds at once.
        violations: why it must not be launched; nothing if it may.
    """

    kernel: str
    direction: str
    tile: str
    microseconds: float
    floor: float
    registers: int
    local_in_loops: int
    resident: int
    violations: list[str]

    @property
    def ratio(self) -> float:
        """The modeled time over the floor."""
        return self.microseconds / self.floor

    def __str__(self) -> str:
        return (
            f"{self.kernel:<22} {self.tile:<13} {self.microseconds:7.1f} us, floor {self.floor:6.1f} us: "
            f"{self.ratio:4.1f}x  registers {self.registers:>3}, {self.resident} resident"
        )


def attention_launches(
    shape: Shape, dtype: torch.dtype, channels_first: bool = False, heads: Heads | None = None
) -> list[Launch]:
    """Return the launches of a forward, a backward and a double backward pass for (B, N, M, d, e).

    Keys and values are parts of one tensor, as the pooled projection makes them. With ``heads`` B is the
    number of maps of all heads.
    """
    b, n, m, d, e = shape

    def rows(count: int, channels: int) -> Tensor:
        if channels_first:
            return torch.empty(b, channels, count, dtype=dtype, device="meta").mT
        return torch.empty(b, count, channels, dtype=dtype, device="meta")

    q = rows(n, d)
    k, v = rows(m, d + e).split((d, e), 2)
    gg_sinks = None
    if heads is not None:
        q, k, v = (rows(*sizes).unflatten(0, (-1, heads.count)) for sizes in ((n, d), (m, d), (m, e)))
        gg_sinks = heads.sinks
    with recorded() as made:
        o, stats = attention_fwd(q, k, v, 1.0, heads)
        grad_o = torch.empty_like(o)
        dq, dk, dv = attention_bwd(grad_o, q, k, v, o, stats, 1.0, heads)
        bwd_bwd_and_sums(dq, dk, dv, grad_o, q, k, v, o, stats, 1.0, heads, gg_sinks)
    return made


def launch_cost(launch: Launch, shape: Shape, capability: int = 90) -> Cost:
    """Compile ``launch`` for ``capability`` (80, 90, 100) and return its modeled cost on an H100's multiprocessors."""
    case = case_of(launch)
    compiled = compile_for(case, capability)
    report = report_of(case, compiled, capability)
    assembly = disassemble(compiled.asm["cubin"])
    outer, inner = _turns(launch, shape)
    issued = matrix_operations = 0.0
    for loop, turns in _counted(loops(assembly), outer, inner):
        issued += turns * len(loop.own)
        matrix_operations += turns * sum(_operations(text) for text in loop.own)
    programs = math.prod(launch.grid)
    warps = launch.config.num_warps
    busiest = -(-programs // MULTIPROCESSORS)  # programs of the fullest multiprocessor
    held = resident(report.registers, report.shared, warps, capability)
    rate = min(MOST_ISSUE, ISSUE_PER_WARP * max(1.0, min(held, busiest) * warps / SCHEDULERS))
    issue_clocks = busiest * warps * issued / SCHEDULERS / rate
    half = launch.arguments[0].element_size() == 2
    matrix_clocks = busiest * warps * matrix_operations / (HALF_OPERATIONS if half else TF32_OPERATIONS)
    return Cost(
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        direction=_direction(launch.kernel.__name__),
        tile=" ".join([str(launch.config), *(name for name in ("QK", "V") if launch.constants.get(name))]),
        microseconds=max(issue_clocks, matrix_clocks) / CLOCK * 1e6,
        floor=floor(launch, shape) * 1e6,
        registers=report.registers,
        local_in_loops=report.local_in_loops,
        resident=held,
        violations=report.violations(case),
    )


def floor(launch: Launch, shape: Shape) -> float:
    """Return the seconds that the products of a launch, or its exponentials, take at least on an H100."""
    b, n, m, d, e = shape
    name, qk, v = launch.kernel.__name__, launch.constants.get("QK", True), launch.constants.get("V", True)
    half = launch.arguments[0].element_size() == 2
    maps = 1
    if "bwd_bwd_rows" in name and half:  # the first walk over the keys gives sums that the second one needs
        maps = 2 if qk else 1
        channels = (2 * (3 * d + 2 * e) + 2 * d if qk else 3 * d) + (2 * e if v else 0)
    elif "bwd_bwd_rows" in name:  # one walk for each output
        maps = 2 if qk and v else 1
        channels = (5 * d + 2 * e if qk else 0) + (3 * d + 2 * e if v else 0)
    elif "bwd_bwd_keys" in name:
        channels = 3 * d + (2 * e + 2 * d if qk else 0) + (e if v else 0)
    elif "bwd_keys" in name:
        channels = d + (e + d if qk else 0) + (e if v else 0)
    else:
        channels = d + e if "fwd" in name else 2 * d + e
    pairs = b * n * m
    # A float32 product is three of TF32.
    rate = HALF_OPERATIONS if half else TF32_OPERATIONS / 3
    clocks = max(2 * pairs * channels / rate, pairs * maps / EXPONENTIALS)
    return clocks / (MULTIPROCESSORS * CLOCK)


def _turns(launch: Launch, shape: Shape) -> tuple[int, int]:
    """Return the turns of a kernel's loop over tiles, and of the loops within it over v's other slabs."""
    _, n, m, _, e = shape
    constants = launch.constants
    over_rows = "keys" in launch.kernel.__name__
    outer = -(-n // constants["R"]) if over_rows else -(-m // constants["C"])
    outer = -(-outer // constants.get("PARTS", 1))
    channels = e if constants["PRECISION"] == "ieee" else constants.get("E", constants["SLAB"])
    return outer, max(0, -(-channels // constants["SLAB"]) - 1)


def _counted(found: Sequence[Loop], outer: int, inner: int) -> Iterator[tuple[Loop, int]]:
    """Yield each loop that walks over tiles, and those within it, with the number of their turns."""
    for loop in found:
        if not any("MUFU.EX2" in text for text in loop.all()):
            continue  # sums along rows, before the walk
        yield loop, outer
        for within in loop.inner:
            yield within, outer * (inner if len(within.own) >= LEAST_LOOP else 1)


def _operations(instruction: str) -> int:
    """Return the floating-point operations that a matrix instruction makes for each of its warps."""
    if found := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\b", instruction):  # by a group of four warps
        m, n, k = (int(size) for size in found.groups())
        return 2 * m * n * k // 4
    if found := re.search(r"\bHMMA\.(16)(8)(\d+)\b", instruction):
        m, n, k = (int(size) for size in found.groups())
        return 2 * m * n * k
    return 0


def _direction(kernel: str) -> str:
    return "double backward" if "bwd_bwd" in kernel else "backward" if "bwd" in kernel else "forward"
