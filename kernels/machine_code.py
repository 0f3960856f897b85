"""Read machine code: the registers and local memory of a kernel, its loops, and whether they use local memory.

Local memory is device memory that holds what has no register. A few bytes of it before or after a loop cost nothing;
in a loop they are read and written at each turn.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import triton

if TYPE_CHECKING:
    import networkx as nx

# Bytes a thread may keep in local memory outside loops: a spill outside loops costs less than a smaller tile.
MOST_LOCAL = 32
# The same where heads of up to 128 channels are walked over in up to two loops. A program then keeps operands of some
# 100 KiB; to set aside 512 bytes of each thread, once, moves about as much, a loop over 1024 keys many times that.
MOST_LOCAL_OF_HEADS = 512


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return the number of registers, and the bytes of stack and of local memory: REG, STACK and LOCAL."""
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _output(cubin, "cuobjdump", "--dump-resource-usage"))
    return {name: int(value) for name, value in found}


def disassemble(cubin: bytes) -> str:
    """Return the kernel's instructions as nvdisasm prints them."""
    return _output(cubin, "nvdisasm", "-c")


def local_memory_in_loops(cubin: bytes) -> int:
    """Return how many instructions that read or write local memory stand in loops."""
    return count_in_loops(disassemble(cubin))


def count_in_loops(assembly: str) -> int:
    """Count loads and stores of local memory (LDL, STL) from which control can come back to them."""
    return sum(re.search(r"\b(LDL|STL)\b", text) is not None for loop in loops(assembly) for text in loop.all())


@dataclass(frozen=True)
class Loop:
    """Instructions that control comes back to.

    Attributes:
        positions: their places among the kernel's instructions.
        own: those of the loop itself.
        inner: the loops within it.
    """

    positions: frozenset[int]
    own: list[str]
    inner: list[Loop]

    def all(self) -> Iterator[str]:
        """Yield the loop's own instructions and those of the loops within it."""
        yield from self.own
        for loop in self.inner:
            yield from loop.all()


def loops(assembly: str) -> list[Loop]:
    """Return the outermost loops.

    The order of the instructions does not tell: loops that wait are moved behind the end of a kernel and branch back
    from there.
    """
    import networkx as nx

    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in assembly.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    flow = nx.DiGraph()
    flow.add_nodes_from(range(len(instructions)))
    for i, instruction in enumerate(instructions):
        target = re.search(r"`\((\.L_x_\d+)\)", instruction)
        if target and target[1] in labels:
            flow.add_edge(i, labels[target[1]])
        # A branch on a predicate names it before the opcode, or before the label.
        if not re.match(r"(BRA(\.\w+)*\s+`|EXIT|RET)", instruction):
            flow.add_edge(i, i + 1)
    return _loops_of(flow, instructions)


def _loops_of(flow: nx.DiGraph, instructions: list[str]) -> list[Loop]:
    import networkx as nx

    found = []
    for part in nx.strongly_connected_components(flow):
        if len(part) == 1:
            continue
        # Every turn passes the instruction by which the loop is entered: without it, what still comes back is within.
        entries = [i for i in part if any(j not in part for j in flow.predecessors(i))]
        inner = _loops_of(flow.subgraph(part - {min(entries or part)}), instructions)
        own = sorted(part.difference(*(loop.positions for loop in inner)))
        found.append(Loop(frozenset(part), [instructions[i] for i in own], inner))
    return sorted(found, key=lambda loop: min(loop.positions))


def _output(cubin: bytes, tool: str, option: str) -> str:
    """Return the output of a tool that Triton ships, run on ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(triton.__file__).parent / "backends/nvidia/bin" / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
