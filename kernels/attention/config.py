"""Launch configurations of the attention kernels: a small frozen table.

Each entry is the largest tile that compiles without local memory at 64 channels of q and k, on all architectures of
its family, sm_90's for operands of both layouts (``tests/kernels/test_aot.py``). What limits it is registers: a program
keeps its own operands and its float32 sums, and of each tile up to five maps. On sm_90 and later the tensor cores want
64 rows of the program's own side; where that leaves too few registers for the sums as wide as v, v is cut into slabs
rather than the tile. float32 operands are split into three TF32 parts, which doubles what is kept, so their tiles are
smaller. Their double backward has registers for the parts only where q and k have few channels; its entries hold for up
to a quarter of the channels of v, and are chosen by d too. The others multiply in float32 proper.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_QK = 64
MAX_E = 256


@dataclass(frozen=True)
class Launch:
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

    def passes(self, e: int) -> list[tuple[dict[str, bool], int]]:
        """What each launch computes and its number of slabs; the first one writes what the second reads."""
        if self.merged and self.slab >= e:
            return [({"QK": True, "V": True}, 1)]
        return [({"QK": True, "V": False}, 1), ({"QK": False, "V": True}, -(-e // self.slab))]


# (kernel, bytes of the dtype, family) -> launches for v of up to 64, 128 and 256 channels.
_TABLE: dict[tuple[str, int, int], tuple[Launch, Launch, Launch]] = {
    ("fwd", 2, 90): (Launch(128, 64, 64, 8), Launch(128, 64, 128, 8), Launch(128, 64, 256, 8)),
    ("fwd", 4, 90): (Launch(128, 32, 64, 8), *(Launch(64, 32, 64, 4),) * 2),
    ("fwd", 2, 80): (Launch(128, 64, 64, 8), *(Launch(128, 64, 128, 8),) * 2),
    ("fwd", 4, 80): (Launch(64, 32, 64, 4), Launch(64, 32, 64, 4), Launch(64, 32, 64, 4)),
    ("bwd_rows", 2, 90): (Launch(64, 64, 64, 4), Launch(64, 64, 128, 4), Launch(64, 64, 256, 4)),
    ("bwd_rows", 4, 90): (Launch(64, 32, 64, 8), Launch(64, 32, 64, 8), Launch(32, 16, 32, 4)),
    ("bwd_rows", 2, 80): (Launch(64, 64, 64, 4), Launch(64, 64, 128, 4), Launch(64, 64, 256, 4)),
    ("bwd_rows", 4, 80): (Launch(32, 32, 64, 4), *(Launch(32, 16, 32, 4),) * 2),
    ("bwd_keys", 2, 90): (Launch(64, 64, 64, 4), Launch(32, 64, 128, 4), Launch(64, 64, 128, 8)),
    ("bwd_keys", 4, 90): (*(Launch(16, 64, 64, 8),) * 2, Launch(16, 32, 32, 4)),
    ("bwd_keys", 2, 80): (Launch(32, 64, 64, 4), Launch(32, 64, 128, 4), Launch(64, 64, 128, 4)),
    ("bwd_keys", 4, 80): (Launch(32, 32, 64, 4), Launch(16, 32, 64, 4), Launch(16, 32, 64, 4)),
    ("bwd_bwd_rows", 2, 90): (Launch(64, 32, 64, 4), Launch(64, 32, 128, 8), Launch(64, 32, 128, 8)),
    ("bwd_bwd_rows", 4, 90): (*(Launch(64, 16, 32, 4, 1, False),) * 2, Launch(16, 16, 32, 8, 2, False, True)),
    ("bwd_bwd_rows", 2, 80): (Launch(32, 32, 64, 4, 2, False), *(Launch(32, 32, 64, 8, 2, False),) * 2),
    ("bwd_bwd_rows", 4, 80): (*(Launch(32, 16, 32, 8, 1, False, True),) * 2, Launch(16, 16, 32, 8, 1, False, True)),
    ("bwd_bwd_rows", 4, 100): (
        Launch(64, 16, 32, 4, 1, False),
        Launch(32, 16, 32, 8, 1, False, True),
        Launch(16, 16, 32, 8, 2, False, True),
    ),
    ("bwd_bwd_keys", 2, 90): (Launch(32, 64, 64, 4), Launch(32, 64, 64, 4), Launch(16, 64, 64, 8)),
    ("bwd_bwd_keys", 4, 90): (
        Launch(16, 64, 32, 4, 1, False),
        Launch(16, 16, 32, 4, 1, False, True),
        Launch(16, 16, 32, 8, 2, False, True),
    ),
    ("bwd_bwd_keys", 2, 80): (Launch(32, 64, 64, 4), Launch(32, 64, 64, 4), Launch(16, 32, 64, 4, 2, False)),
    ("bwd_bwd_keys", 4, 100): (
        *(Launch(16, 16, 32, 4, 1, False, True),) * 2,
        Launch(16, 16, 32, 8, 2, False, True),
    ),
    ("bwd_bwd_keys", 4, 80): (Launch(32, 32, 32, 8, 1, False, True), *(Launch(16, 16, 32, 8, 2, False, True),) * 2),
}
_E_CLASSES = (64, 128, 256)


def unsupported(d: int, e: int) -> str:
    """Why the kernels cannot take so many channels of q and v; "" where they can."""
    if d > MAX_QK:
        return f"q must have at most {MAX_QK} channels for impl='triton', got {d}"
    if e > MAX_E:
        return f"v must have at most {MAX_E} channels for impl='triton', got {e}"
    return ""


def padded(channels: int) -> int:
    """Channels of a tile: the next power of two, at least 16 as the matrix units demand."""
    return max(16, 1 << (channels - 1).bit_length())


def launch_for(kernel: str, e: int, q: Tensor) -> Launch:
    """The launch of ``kernel`` for values of ``e`` channels and operands like ``q``."""
    return _launch(kernel, q.dtype.itemsize, _family_of(q.device), q.shape[2], e)


@functools.cache
def _launch(kernel: str, itemsize: int, family: int, d: int, e: int) -> Launch:
    channels = e if d <= most_qk(kernel, itemsize, e) else 4 * d
    launch = _entries(kernel, itemsize, family)[_class(channels)]
    return replace(launch, slab=min(launch.slab, padded(e)))


def most_qk(kernel: str, itemsize: int, e: int) -> int:
    """The most channels of q for which an entry for ``e`` channels of v holds."""
    return max(16, e // 4) if itemsize == 4 and kernel.startswith("bwd_bwd") else MAX_QK


@functools.cache
def _family_of(device: torch.device) -> int:
    return _family(torch.cuda.get_device_capability(device)[0] * 10 if device.type == "cuda" else 90)


def entries(capability: int) -> Iterator[tuple[str, int, Launch, torch.dtype]]:
    """Every entry for ``capability``: kernel, the most channels of v that it serves, launch and dtype."""
    for kernel, itemsize in dict.fromkeys((kernel, itemsize) for kernel, itemsize, _ in _TABLE):
        for e, launch in zip(_E_CLASSES, _entries(kernel, itemsize, _family(capability)), strict=True):
            yield kernel, e, launch, torch.float16 if itemsize == 2 else torch.float32


def _entries(kernel: str, itemsize: int, family: int) -> tuple[Launch, Launch, Launch]:
    """Those for sm_100 where there are any, as tcgen05 leaves other registers free than wgmma; else sm_90's."""
    return _TABLE.get((kernel, itemsize, family)) or _TABLE[kernel, itemsize, min(family, 90)]


def _family(capability: int) -> int:
    return 100 if capability >= 100 else 90 if capability >= 90 else 80


def _class(e: int) -> int:
    return next(i for i, most in enumerate(_E_CLASSES) if e <= most)
