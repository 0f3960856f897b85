"""Launch configurations of the attention kernels: a small frozen table.

Each entry compiles without local memory in its loops at the most channels that it is for, on all architectures of its
family, and so does what attention blocks launch on sm_90 in both layouts (``tests/kernels/test_aot.py``). Registers
limit it: a program keeps its own operands and its float32 sums, and of each tile up to five maps. The tensor cores of
sm_90 and later want 64 rows of the program's own side; if that leaves too few registers for the sums as wide as v, v is
cut into slabs rather than the tile. float32 operands are split into three TF32 parts, which doubles what is kept, so
their tiles are smaller. A double backward that has no registers for the parts multiplies in float32 proper.

Among the tiles that compile, sm_90's are those that ``python -m fastgan.kernels.report --model`` ranks first: four
warps for each 64 rows, since eight warps on 64 are two groups that share the narrow side of the product, and mostly a
single pipeline stage, which leaves room for more programs on a multiprocessor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

MAX_QK = 128
SINGLE_QK = 64  # those of one unmasked head; more are launched as one of several
MAX_E = 256
# Where few programs own keys, the rows are split: into so many parts that each multiprocessor has RESIDENT programs, or
# that each walks over LEAST_TURNS tiles, or MOST_PARTS.
RESIDENT = 3
LEAST_TURNS = 10
MOST_PARTS = 16


@dataclass(frozen=True)
class Tile:
    """One way to launch a kernel.

    Attributes:
        rows: query rows of a tile.
        keys: keys of a tile.
        slab: channels of v that a program holds at a time.
        num_warps: warps of a program.
        num_stages: software-pipeline stages.
        scalar: float32 operands are multiplied by the scalar units, but for the logits.
    """

    rows: int
    keys: int
    slab: int
    num_warps: int
    num_stages: int = 2
    scalar: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}"

    def constants(self) -> dict[str, int]:
        """Return the constants of the kernels that give the tile's size."""
        return {"R": self.rows, "C": self.keys, "SLAB": self.slab}

    def smaller(self) -> Tile | None:
        """Return a tile with half the rows or half the keys, whichever are more; None at the least the units take."""
        if self.rows == self.keys == 16:
            return None
        return replace(self, rows=self.rows // 2) if self.rows > self.keys else replace(self, keys=self.keys // 2)


# The most channels of q and of v that an entry is for, and its tiles: one, or one for the outputs as wide as q and one
# for those as wide as v, which then come from launches of their own.
Entry: TypeAlias = tuple[int, int, Tile] | tuple[int, int, Tile, Tile]

# (kernel, bytes of the dtype, oldest capability) -> entries; the first that is wide enough is used.
_TABLE: dict[tuple[str, int, int], tuple[Entry, ...]] = {
    ("fwd", 2, 90): (
        (64, 64, Tile(128, 64, 64, 8)),
        (32, 128, Tile(64, 64, 128, 4)),
        (64, 256, Tile(128, 64, 256, 8)),
    ),
    ("fwd", 4, 90): (
        (64, 32, Tile(128, 32, 32, 8, 1)),
        (16, 64, Tile(64, 32, 64, 4)),
        (64, 64, Tile(128, 32, 64, 8)),
        (64, 256, Tile(128, 32, 128, 8)),
    ),
    ("fwd", 4, 100): (
        (64, 64, Tile(128, 32, 64, 8)),
        (64, 256, Tile(64, 32, 64, 4)),
    ),
    ("fwd", 2, 80): (
        (64, 64, Tile(128, 64, 64, 8)),
        (64, 256, Tile(128, 64, 128, 8)),
    ),
    ("fwd", 4, 80): ((64, 256, Tile(64, 32, 64, 4)),),
    ("bwd_rows", 2, 90): (
        (16, 64, Tile(64, 64, 64, 4, 1)),
        (64, 64, Tile(64, 64, 64, 4)),
        (32, 128, Tile(64, 64, 128, 4, 1)),
        (64, 256, Tile(128, 64, 128, 8)),
    ),
    ("bwd_rows", 4, 90): (
        (16, 64, Tile(128, 32, 32, 8, 1)),
        (32, 128, Tile(64, 32, 64, 4, 1)),
        (64, 256, Tile(64, 32, 32, 4)),
    ),
    ("bwd_rows", 4, 100): (
        (64, 128, Tile(64, 32, 64, 8)),
        (64, 256, Tile(32, 16, 32, 4)),
    ),
    ("bwd_rows", 2, 80): (
        (64, 64, Tile(64, 64, 64, 4)),
        (64, 128, Tile(64, 64, 128, 4)),
        (64, 256, Tile(64, 64, 256, 4)),
    ),
    ("bwd_rows", 4, 80): (
        (64, 64, Tile(32, 32, 64, 4)),
        (64, 256, Tile(32, 16, 32, 4)),
    ),
    ("bwd_keys", 2, 90): (
        (16, 32, Tile(64, 64, 32, 4, 1)),
        (16, 64, Tile(32, 64, 64, 4, 1)),
        (32, 128, Tile(32, 64, 128, 4, 1)),
        (64, 256, Tile(32, 64, 128, 4, 1), Tile(32, 64, 128, 4, 1)),
    ),
    ("bwd_keys", 4, 90): (
        (16, 64, Tile(32, 64, 64, 4, 1)),
        (32, 128, Tile(32, 64, 64, 4, 1), Tile(32, 64, 64, 4, 1)),
        (64, 256, Tile(32, 64, 32, 4, 1), Tile(32, 64, 32, 4, 1)),
    ),
    ("bwd_keys", 4, 100): (
        (64, 128, Tile(16, 64, 64, 8)),
        (64, 256, Tile(16, 32, 32, 4)),
    ),
    ("bwd_keys", 2, 80): (
        (64, 64, Tile(32, 64, 64, 4)),
        (64, 128, Tile(32, 64, 128, 4)),
        (64, 256, Tile(64, 64, 128, 4)),
    ),
    ("bwd_keys", 4, 80): (
        (64, 64, Tile(32, 32, 64, 4)),
        (64, 256, Tile(16, 32, 64, 4)),
    ),
    ("bwd_bwd_rows", 2, 90): (
        (16, 64, Tile(64, 32, 64, 4, 1)),
        (32, 128, Tile(64, 32, 64, 4, 1), Tile(64, 32, 128, 4, 1)),
        (64, 256, Tile(64, 32, 32, 4, 1), Tile(64, 32, 128, 4, 1)),
    ),
    ("bwd_bwd_rows", 4, 90): (
        (16, 32, Tile(64, 16, 32, 4, 1), Tile(64, 32, 32, 4, 1)),
        (16, 64, Tile(64, 16, 32, 4, 1), Tile(64, 16, 64, 4, 1)),
        (32, 128, Tile(64, 16, 64, 4, 1), Tile(64, 32, 32, 4, 1)),
        (64, 256, Tile(128, 16, 32, 8, 1), Tile(128, 16, 64, 8, 1)),
    ),
    ("bwd_bwd_rows", 2, 80): (
        (64, 64, Tile(32, 32, 64, 4), Tile(32, 32, 64, 4)),
        (64, 256, Tile(32, 32, 64, 8), Tile(32, 32, 64, 8)),
    ),
    ("bwd_bwd_rows", 4, 80): (
        (32, 128, Tile(32, 16, 32, 8, 1, True), Tile(32, 16, 32, 8, 1, True)),
        (64, 256, Tile(16, 16, 32, 8, 1, True), Tile(16, 16, 32, 8, 1, True)),
    ),
    ("bwd_bwd_rows", 4, 100): (
        (16, 64, Tile(64, 16, 32, 4, 1), Tile(64, 16, 32, 4, 1)),
        (32, 128, Tile(32, 16, 32, 8, 1, True), Tile(32, 16, 32, 8, 1, True)),
        (64, 256, Tile(16, 16, 32, 8, 2, True), Tile(16, 16, 32, 8, 2, True)),
    ),
    ("bwd_bwd_keys", 2, 90): (
        (16, 64, Tile(32, 64, 64, 4, 1)),
        (32, 128, Tile(32, 64, 128, 4, 1)),
        (64, 256, Tile(16, 64, 128, 4, 1), Tile(32, 64, 128, 4, 1)),
    ),
    ("bwd_bwd_keys", 4, 90): (
        (16, 32, Tile(16, 64, 32, 4, 1), Tile(32, 64, 32, 4, 1)),
        (16, 64, Tile(16, 64, 64, 4, 1), Tile(16, 64, 64, 4, 1)),
        (32, 128, Tile(16, 64, 32, 4, 1), Tile(16, 64, 128, 4, 1)),
        (64, 256, Tile(32, 32, 16, 4, 1), Tile(16, 64, 64, 4, 1)),
    ),
    ("bwd_bwd_keys", 2, 100): (
        (64, 128, Tile(32, 64, 64, 4)),
        (64, 256, Tile(16, 64, 64, 8)),
    ),
    ("bwd_bwd_keys", 2, 80): (
        (64, 128, Tile(32, 64, 64, 4)),
        (64, 256, Tile(16, 32, 64, 4), Tile(16, 32, 64, 4)),
    ),
    ("bwd_bwd_keys", 4, 100): (
        (32, 128, Tile(16, 16, 32, 4, 1, True), Tile(16, 16, 32, 4, 1, True)),
        (64, 256, Tile(16, 16, 32, 8, 2, True), Tile(16, 16, 32, 8, 2, True)),
    ),
    ("bwd_bwd_keys", 4, 80): (
        (16, 64, Tile(32, 32, 32, 8, 1, True), Tile(32, 32, 32, 8, 1, True)),
        (64, 256, Tile(16, 16, 32, 8, 2, True), Tile(16, 16, 32, 8, 2, True)),
    ),
}
# The same for operands with heads under a mask that is a tensor, whose addresses take registers. Each holds under a
# causal and an additive mask, with sinks. An entry ends where v no longer fits one slab, as other launches follow.
_MASKED: dict[tuple[str, int, int], tuple[Entry, ...]] = {
    ("fwd", 2, 80): ((128, 256, Tile(128, 32, 64, 8)),),
    ("fwd", 4, 80): (
        (64, 256, Tile(32, 32, 64, 4, 1)),
        (128, 256, Tile(32, 32, 64, 8, 1)),
    ),
    ("bwd_rows", 2, 80): (
        (64, 64, Tile(64, 32, 64, 4)),
        (128, 128, Tile(64, 32, 64, 8)),
        (128, 256, Tile(32, 32, 128, 8)),
    ),
    ("bwd_rows", 4, 80): (
        (64, 128, Tile(32, 32, 64, 8, 1)),
        (128, 128, Tile(16, 16, 64, 4, 1)),
        (128, 256, Tile(16, 16, 32, 4, 1)),
    ),
    ("bwd_keys", 2, 80): (
        (128, 64, Tile(32, 64, 64, 8)),
        (128, 128, Tile(32, 64, 64, 8)),
        (128, 256, Tile(32, 64, 32, 8)),
    ),
    ("bwd_keys", 4, 80): (
        (64, 64, Tile(32, 32, 64, 4, 1)),
        (64, 128, Tile(32, 32, 64, 4, 1)),
        (128, 64, Tile(16, 32, 32, 8, 1)),
        (128, 128, Tile(16, 16, 64, 4, 1)),
        (128, 256, Tile(16, 32, 32, 8, 1)),
    ),
    ("bwd_bwd_rows", 2, 80): (
        (64, 64, Tile(32, 16, 64, 4, 1)),
        (64, 256, Tile(32, 16, 32, 8, 1)),
        (128, 64, Tile(16, 16, 64, 4, 1)),
        (128, 128, Tile(16, 16, 64, 8, 1)),
        (128, 256, Tile(16, 16, 32, 4, 1)),
    ),
    ("bwd_bwd_rows", 4, 80): (
        (64, 256, Tile(16, 16, 64, 8, 1, True)),
        (128, 64, Tile(16, 16, 32, 8, 1, True)),
        (128, 256, Tile(16, 16, 64, 8, 1, True)),
    ),
    ("bwd_bwd_keys", 2, 80): (
        (64, 64, Tile(32, 32, 64, 4, 1)),
        (64, 256, Tile(16, 32, 64, 4, 1)),
        (128, 64, Tile(16, 16, 64, 4, 1)),
        (128, 256, Tile(16, 16, 64, 4, 1)),
    ),
    ("bwd_bwd_keys", 4, 80): (
        (128, 64, Tile(16, 16, 64, 8, 1, True)),
        (64, 256, Tile(16, 16, 64, 8, 1, True)),
        (128, 256, Tile(16, 16, 32, 8, 2, True)),
    ),
}

# Those of heads without such a mask, causal or not, with or without sinks. Other architectures take those of a mask.
_HEADS: dict[tuple[str, int, int], tuple[Entry, ...]] = {
    ("fwd", 2, 90): (
        (64, 64, Tile(128, 32, 64, 8)),
        (128, 128, Tile(128, 64, 128, 8)),
    ),
    ("fwd", 4, 90): (
        (64, 64, Tile(64, 32, 64, 4, 1)),
        (128, 128, Tile(64, 16, 64, 4, 1)),
    ),
    ("bwd_rows", 2, 90): (
        (64, 64, Tile(128, 64, 64, 8)),
        (128, 128, Tile(64, 32, 128, 4, 1)),
    ),
    ("bwd_rows", 4, 90): ((64, 64, Tile(64, 32, 64, 4, 1)),),
    ("bwd_keys", 2, 90): (
        (64, 64, Tile(32, 64, 64, 4, 1)),
        (128, 128, Tile(64, 128, 64, 8, 1), Tile(32, 64, 128, 4, 1)),
    ),
    ("bwd_keys", 4, 90): ((64, 64, Tile(16, 64, 64, 4, 1)),),
    ("bwd_bwd_rows", 2, 90): (
        (64, 64, Tile(64, 32, 64, 4, 1)),
        (128, 128, Tile(32, 16, 64, 4, 1), Tile(128, 32, 64, 8, 1)),
    ),
    ("bwd_bwd_rows", 4, 90): ((64, 64, Tile(64, 16, 32, 4, 1), Tile(128, 16, 64, 8, 1)),),
    ("bwd_bwd_keys", 2, 90): (
        (64, 64, Tile(32, 64, 64, 4, 1)),
        (128, 128, Tile(16, 128, 64, 8, 1), Tile(16, 128, 64, 8, 1)),
    ),
    ("bwd_bwd_keys", 4, 90): ((64, 64, Tile(16, 32, 32, 4, 1), Tile(16, 64, 32, 4, 1)),),
}
# One head without a mask; heads without one that is a tensor; heads under such a mask.
Operands: TypeAlias = Literal["single", "heads", "masked"]


def unsupported(d: int, e: int) -> str:
    """Return why the kernels cannot take so many channels of q and v; "" if they can."""
    if d > MAX_QK:
        return f"q must have at most {MAX_QK} channels for impl='triton', got {d}"
    if e > MAX_E:
        return f"v must have at most {MAX_E} channels for impl='triton', got {e}"
    return ""


def padded(channels: int) -> int:
    """Return the channels of a tile: the next power of two, at least 16 as the matrix units demand."""
    return max(16, 1 << (channels - 1).bit_length())


@dataclass(frozen=True)
class Pass:
    """One of the launches that make a kernel's outputs.

    Attributes:
        tile: its tile.
        slabs: programs that share v's channels.
        outputs: the constants QK and V, which say whether outputs as wide as q and as wide as v are computed. Empty for
            kernels that have no such choice.
    """

    tile: Tile
    slabs: int
    outputs: dict[str, bool]


def passes(kernel: str, e: int, q: Tensor, kind: Operands) -> tuple[Pass, ...]:
    """Return the launches of ``kernel`` for values of ``e`` channels and operands of this kind, q one of them.

    Each may read what those before it wrote.
    """
    return _passes(kernel, q.dtype.itemsize, _capability(q.device), q.shape[-1], e, kind)


@functools.cache
def _passes(kernel: str, itemsize: int, capability: int, d: int, e: int, kind: Operands) -> tuple[Pass, ...]:
    entries = _entries(kind, kernel, itemsize, capability)
    found = _passes_of(kernel, next(entry for entry in entries if d <= entry[0] and e <= entry[1]), e)
    # In float32 gq, which is as wide as q, is computed from g_dO, in half precision g_dO from sums that gq needs.
    return found[::-1] if kernel == "bwd_bwd_rows" and itemsize == 4 else found


def parts_of_rows(one: Pass, b: int, n: int, m: int, device: torch.device) -> int:
    """Return into how many parts the n rows are split for a launch whose programs own some of the m keys of b maps.

    There are several if the programs would leave most of a GPU's multiprocessors idle, and if each has enough to do to
    be worth the sum over the parts.
    """
    programs, turns = -(-m // one.tile.keys) * b * one.slabs, -(-n // one.tile.rows)
    return max(1, min(RESIDENT * _multiprocessors(device) // programs, turns // LEAST_TURNS, MOST_PARTS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _passes_of(kernel: str, entry: Entry, e: int) -> tuple[Pass, ...]:
    tiles = [replace(tile, slab=min(tile.slab, padded(e))) for tile in entry[2:]]
    first, last = tiles[0], tiles[-1]
    slabs = -(-e // last.slab)
    if kernel in ("fwd", "bwd_rows"):
        return (Pass(first, slabs if kernel == "fwd" else 1, {}),)
    if len(tiles) == 1 and slabs == 1:
        return (Pass(first, 1, {"QK": True, "V": True}),)
    return Pass(first, 1, {"QK": True, "V": False}), Pass(last, slabs, {"QK": False, "V": True})


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] * 10 if device.type == "cuda" else 90


def launches(capability: int, kind: Operands) -> Iterator[tuple[str, int, int, Pass, torch.dtype]]:
    """Yield every launch in the tables for ``capability``: kernel, the most channels of q and of v that its entry
    serves, the launch and its dtype. Those that heads share with masked ones are masked."""
    for kernel, itemsize in dict.fromkeys((kernel, itemsize) for kernel, itemsize, _ in _MASKED):
        own = _HEADS.get((kernel, itemsize, capability), ())
        for entry in own if kind == "heads" else _entries(kind, kernel, itemsize, capability):
            for one in _passes_of(kernel, entry, entry[1]):
                yield kernel, entry[0], entry[1], one, torch.bfloat16 if itemsize == 2 else torch.float32


def _entries(kind: Operands, kernel: str, itemsize: int, capability: int) -> tuple[Entry, ...]:
    """Those of the newest family up to ``capability``: tcgen05 leaves other registers free than wgmma."""
    table = _TABLE if kind == "single" else _MASKED
    families = (family for family in (100, 90, 80) if family <= max(capability, 80))
    found = next(table[kernel, itemsize, family] for family in families if (kernel, itemsize, family) in table)
    return _HEADS.get((kernel, itemsize, capability), ()) + found if kind == "heads" else found
