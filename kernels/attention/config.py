"""Launch configurations of the attention kernels: a small frozen table.

Each entry compiles without local memory in its loops at the most channels that it is for, on all architectures of its
family, sm_90's for operands of both layouts (``tests/kernels/test_aot.py``). Registers limit it: a program keeps its
own operands and its float32 sums, and of each tile up to five maps. The tensor cores of sm_90 and later want 64 rows of
the program's own side; if that leaves too few registers for the sums as wide as v, v is cut into slabs rather than the
tile. float32 operands are split into three TF32 parts, which doubles what is kept, so their tiles are smaller. A
double backward that has no registers for the parts multiplies in float32 proper.

Among the tiles that compile, sm_90's are those that ``python -m fastgan.kernels.report --model`` ranks first: four
warps on 64 rows, since eight warps are two groups that share the narrow side of the product, and a single pipeline
stage only if two would halve the programs that a multiprocessor holds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_QK = 128
SINGLE_QK = 64  # those of one unmasked head; more are launched as one of several
MAX_E = 256


@dataclass(frozen=True)
class Tile:
    """One way to launch a kernel.

    Attributes:
        rows: query rows of a tile.
        keys: keys of a tile.
        slab: channels of v that a program holds at a time.
        num_warps: warps of a program.
        num_stages: software-pipeline stages.
        merged: outputs as wide as q and as wide as v come from one launch, where one slab holds all of v.
        scalar: float32 operands are multiplied by the scalar units, but for the logits.
    """

    rows: int
    keys: int
    slab: int
    num_warps: int
    num_stages: int = 2
    merged: bool = True
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

    def passes(self, e: int) -> list[tuple[dict[str, bool], int]]:
        """Return what each launch computes and its number of slabs; the first one writes what the second reads."""
        if self.merged and self.slab >= e:
            return [({"QK": True, "V": True}, 1)]
        return [({"QK": True, "V": False}, 1), ({"QK": False, "V": True}, -(-e // self.slab))]


# (kernel, bytes of the dtype, oldest capability) -> the most channels of q and of v that a tile is for, and the tile.
# The first that is wide enough is taken.
_TABLE: dict[tuple[str, int, int], tuple[tuple[int, int, Tile], ...]] = {
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
        (64, 64, Tile(64, 64, 64, 4)),
        (32, 128, Tile(64, 64, 128, 4)),
        (64, 256, Tile(128, 64, 128, 8)),
    ),
    ("bwd_rows", 4, 90): (
        (16, 64, Tile(64, 32, 32, 4)),
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
        (16, 64, Tile(64, 64, 64, 4, 1)),
        (32, 128, Tile(32, 64, 128, 4, 1)),
        (64, 256, Tile(32, 64, 128, 4, 1, False)),
    ),
    ("bwd_keys", 4, 90): (
        (16, 32, Tile(16, 64, 32, 4, 1)),
        (16, 64, Tile(32, 64, 64, 4)),
        (32, 128, Tile(32, 64, 64, 4, 1, False)),
        (64, 256, Tile(32, 64, 32, 4, 1, False)),
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
        (32, 128, Tile(64, 32, 64, 4)),
        (64, 256, Tile(64, 32, 128, 4, 1, False)),
    ),
    ("bwd_bwd_rows", 4, 90): (
        (16, 64, Tile(64, 16, 32, 4, 1, False)),
        (32, 128, Tile(64, 16, 64, 4, 1, False)),
        (64, 256, Tile(64, 16, 16, 8, 1, False)),
    ),
    ("bwd_bwd_rows", 2, 80): (
        (64, 64, Tile(32, 32, 64, 4, 2, False)),
        (64, 256, Tile(32, 32, 64, 8, 2, False)),
    ),
    ("bwd_bwd_rows", 4, 80): (
        (32, 128, Tile(32, 16, 32, 8, 1, False, True)),
        (64, 256, Tile(16, 16, 32, 8, 1, False, True)),
    ),
    ("bwd_bwd_rows", 4, 100): (
        (16, 64, Tile(64, 16, 32, 4, 1, False)),
        (32, 128, Tile(32, 16, 32, 8, 1, False, True)),
        (64, 256, Tile(16, 16, 32, 8, 2, False, True)),
    ),
    ("bwd_bwd_keys", 2, 90): (
        (16, 64, Tile(32, 64, 64, 4, 1)),
        (32, 128, Tile(32, 64, 128, 4, 1)),
        (64, 256, Tile(32, 64, 128, 4, 1, False)),
    ),
    ("bwd_bwd_keys", 4, 90): (
        (32, 128, Tile(16, 64, 32, 4, 1, False)),
        (64, 256, Tile(16, 16, 32, 4, 1, False)),
    ),
    ("bwd_bwd_keys", 2, 100): (
        (64, 128, Tile(32, 64, 64, 4)),
        (64, 256, Tile(16, 64, 64, 8)),
    ),
    ("bwd_bwd_keys", 2, 80): (
        (64, 128, Tile(32, 64, 64, 4)),
        (64, 256, Tile(16, 32, 64, 4, 2, False)),
    ),
    ("bwd_bwd_keys", 4, 100): (
        (32, 128, Tile(16, 16, 32, 4, 1, False, True)),
        (64, 256, Tile(16, 16, 32, 8, 2, False, True)),
    ),
    ("bwd_bwd_keys", 4, 80): (
        (16, 64, Tile(32, 32, 32, 8, 1, False, True)),
        (64, 256, Tile(16, 16, 32, 8, 2, False, True)),
    ),
}
# The same by kernel and bytes of the dtype, for operands with heads. Each holds on all architectures under a mask and
# with sinks. An entry ends where v no longer fits one slab, as other launches follow.
_HEADS: dict[tuple[str, int], tuple[tuple[int, int, Tile], ...]] = {
    ("fwd", 2): (
        (64, 256, Tile(128, 32, 64, 8)),
        (128, 256, Tile(128, 32, 64, 8)),
    ),
    ("fwd", 4): (
        (64, 256, Tile(32, 32, 64, 4, 1)),
        (128, 256, Tile(32, 32, 64, 8, 1)),
    ),
    ("bwd_rows", 2): (
        (64, 64, Tile(64, 32, 64, 4)),
        (64, 128, Tile(64, 32, 128, 8)),
        (64, 256, Tile(64, 32, 32, 8)),
        (128, 128, Tile(64, 32, 64, 8)),
        (128, 256, Tile(32, 32, 128, 8)),
    ),
    ("bwd_rows", 4): (
        (64, 128, Tile(32, 32, 64, 8, 1)),
        (64, 256, Tile(32, 32, 32, 8, 1)),
        (128, 128, Tile(16, 16, 64, 4, 1)),
        (128, 256, Tile(16, 16, 32, 4, 1)),
    ),
    ("bwd_keys", 2): (
        (64, 64, Tile(32, 64, 64, 8)),
        (64, 256, Tile(32, 64, 64, 8)),
        (128, 64, Tile(32, 64, 64, 8)),
        (128, 128, Tile(32, 64, 64, 8)),
        (128, 256, Tile(32, 64, 32, 8)),
    ),
    ("bwd_keys", 4): (
        (64, 64, Tile(32, 32, 64, 4, 1)),
        (64, 128, Tile(32, 32, 64, 4, 1)),
        (64, 256, Tile(32, 32, 32, 8, 1)),
        (128, 64, Tile(16, 32, 32, 8, 1)),
        (128, 128, Tile(16, 16, 64, 4, 1)),
        (128, 256, Tile(16, 32, 32, 8, 1)),
    ),
    ("bwd_bwd_rows", 2): (
        (64, 64, Tile(32, 16, 64, 4, 1)),
        (64, 256, Tile(32, 32, 32, 8, 1)),
        (128, 64, Tile(16, 16, 64, 4, 1)),
        (128, 128, Tile(16, 16, 64, 8, 1)),
        (128, 256, Tile(16, 16, 32, 4, 1)),
    ),
    ("bwd_bwd_rows", 4): (
        (64, 256, Tile(16, 16, 64, 8, 1, True, True)),
        (128, 64, Tile(16, 16, 32, 8, 1, True, True)),
        (128, 256, Tile(16, 16, 64, 8, 1, True, True)),
    ),
    ("bwd_bwd_keys", 2): (
        (64, 64, Tile(32, 32, 64, 4, 1)),
        (64, 256, Tile(16, 32, 64, 4, 1)),
        (128, 64, Tile(16, 16, 64, 4, 1)),
        (128, 256, Tile(16, 16, 64, 4, 1)),
    ),
    ("bwd_bwd_keys", 4): (
        (64, 64, Tile(16, 16, 64, 8, 1, True, True)),
        (64, 256, Tile(16, 16, 64, 8, 1, True, True)),
        (128, 64, Tile(16, 16, 64, 8, 1, True, True)),
        (128, 256, Tile(16, 16, 32, 8, 2, True, True)),
    ),
}


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


def tile_for(kernel: str, e: int, q: Tensor) -> Tile:
    """Return the tile of ``kernel`` for values of ``e`` channels and operands like ``q``, which has 4 dimensions if it
    has heads."""
    return _tile(kernel, q.dtype.itemsize, _capability(q.device), q.shape[-1], e, q.ndim == 4)


@functools.cache
def _tile(kernel: str, itemsize: int, capability: int, d: int, e: int, has_heads: bool) -> Tile:
    entries = _HEADS[kernel, itemsize] if has_heads else _entries(kernel, itemsize, capability)
    tile = next(tile for most_d, most_e, tile in entries if d <= most_d and e <= most_e)
    return replace(tile, slab=min(tile.slab, padded(e)))


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] * 10 if device.type == "cuda" else 90


def entries(capability: int) -> Iterator[tuple[str, int, int, Tile, torch.dtype]]:
    """Yield every entry for ``capability``: kernel, the most channels of q and of v that it serves, tile and dtype."""
    for kernel, itemsize in dict.fromkeys((kernel, itemsize) for kernel, itemsize, _ in _TABLE):
        for d, e, tile in _entries(kernel, itemsize, capability):
            yield kernel, d, e, tile, torch.float16 if itemsize == 2 else torch.float32


def entries_of_heads() -> Iterator[tuple[str, int, int, Tile, torch.dtype]]:
    """Yield every entry for operands with heads, as :func:`entries` does."""
    for (kernel, itemsize), tiles in _HEADS.items():
        for d, e, tile in tiles:
            yield kernel, d, e, tile, torch.float16 if itemsize == 2 else torch.float32


def _entries(kernel: str, itemsize: int, capability: int) -> tuple[tuple[int, int, Tile], ...]:
    """Those of the newest family up to ``capability``: tcgen05 leaves other registers free than wgmma."""
    families = (family for family in (100, 90, 80) if family <= max(capability, 80))
    return next(_TABLE[kernel, itemsize, family] for family in families if (kernel, itemsize, family) in _TABLE)
