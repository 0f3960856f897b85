"""Tiles that the installed Triton spills, with kernels that only record how they were launched."""

import inspect
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

import triton

from fastgan import backend
from fastgan.kernels import launch as module
from fastgan.kernels.attention.config import Tile
from fastgan.kernels.launch import launch, recorded
from fastgan.kernels.projections import PixelTile
from fastgan.kernels.spectral_norm.plan import TILES


@dataclass(eq=False)
class Compiled:
    """The part of Triton's CompiledKernel that is read; the "machine code" says how much of it uses local memory."""

    n_spills: int
    in_loops: int

    @property
    def asm(self):
        return {"cubin": self.in_loops}


class Kernel:
    """Compiles, once per tile and per divisibility of its first integer, code that spills as ``spills`` tells."""

    __name__ = "some_kernel"

    def __init__(self, spills):
        self.spills, self.compiled, self.launches = spills, {}, []

    def __getitem__(self, grid):
        def run(*arguments, R, C, **_):
            divisible = arguments[1] % 16 == 0
            self.launches.append((grid, R, C))
            return self.compiled.setdefault((R, C, divisible), Compiled(*self.spills(R, C, divisible)))

        return run


@pytest.fixture(autouse=True)
def disassemblies(monkeypatch):
    """The machine code that was looked at; nothing is remembered of other tests."""
    looked_at = []
    monkeypatch.setattr(module, "_seen", set())
    monkeypatch.setattr(module, "_instead", {})
    monkeypatch.setattr(module, "SPILLED", [])
    monkeypatch.setattr(backend, "SPILLED", module.SPILLED)
    monkeypatch.setattr(module, "local_memory_in_loops", lambda cubin: looked_at.append(cubin) or cubin)
    return looked_at


TILE = Tile(64, 64, 64, 4)


def run(kernel, size=32, tile=TILE):
    """Launch, and return the tiles of the launches that this took."""
    before = len(kernel.launches)
    launch(kernel, tile, lambda tile: (tile.rows, 7), (torch.zeros(4), size, 0.5), D=16)
    assert all(grid == (rows, 7) for grid, rows, _ in kernel.launches)
    return [(rows, keys) for _, rows, keys in kernel.launches[before:]]


def test_a_recorded_launch_is_not_made():
    kernel = Kernel(lambda *_: (9, 9))
    tensor = torch.zeros(4)
    with recorded() as made:
        assert launch(kernel, TILE, lambda tile: (tile.rows, 7), (tensor, 32, 0.5), D=16) is None
    assert kernel.launches == []
    (one,) = made
    assert (one.kernel, one.config, one.grid) == (kernel, TILE, (64, 7))
    assert one.arguments[0] is tensor
    assert one.arguments[1:] == (32, 0.5)
    assert one.constants == {"R": 64, "C": 64, "SLAB": 64, "D": 16}
    assert run(Kernel(lambda *_: (0, 0))) == [(64, 64)]  # made again, after the block


def test_a_tile_that_spills_in_a_loop_gives_way_to_a_smaller_one(disassemblies):
    kernel = Kernel(lambda rows, keys, _: (3, 5) if rows * keys > 1024 else (0, 0))
    assert run(kernel) == [(64, 64), (64, 32), (32, 32)]
    assert disassemblies == [5, 5]
    assert run(kernel) == run(kernel) == [(32, 32)]
    assert disassemblies == [5, 5]
    assert "some_kernel spills in a loop at 64x64 and runs at 32x32" in backend.backend_status()["triton"].detail


def test_a_tile_without_spills_in_loops_stays(disassemblies):
    for spills, looked_at in (((0, 0), []), ((2, 0), [0])):
        kernel = Kernel(lambda *_, spills=spills: spills)
        assert run(kernel) == run(kernel) == [(64, 64)]
        assert disassemblies == looked_at
    assert backend.SPILLED == []


def test_if_all_tiles_spill_the_first_stays(disassemblies):
    kernel = Kernel(lambda *_: (9, 9))
    assert run(kernel) == [(64, 64), (64, 32), (32, 32), (32, 16), (16, 16), (64, 64)]
    assert run(kernel) == [(64, 64)]
    assert backend.SPILLED == ["some_kernel spills in a loop at 64x64 and at all smaller tiles"]


def test_each_specialization_has_a_tile_of_its_own():
    kernel = Kernel(lambda rows, _, divisible: (0, 0) if divisible or rows < 64 else (1, 1))
    assert run(kernel, 32) == [(64, 64)]
    assert run(kernel, 33) == [(64, 64), (64, 32), (32, 32)]
    assert run(kernel, 48) == [(64, 64)]
    assert run(kernel, 35) == [(32, 32)]
    assert run(kernel, 33, Tile(32, 64, 64, 4)) == [(32, 64)]


def test_without_a_disassembler_a_small_spill_is_no_reason(monkeypatch):
    def missing(cubin):
        raise FileNotFoundError

    monkeypatch.setattr(module, "local_memory_in_loops", missing)
    assert run(Kernel(lambda *_: (4, 0))) == [(64, 64)]
    assert run(Kernel(lambda rows, *_: (40 if rows == 64 else 0, 0))) == [(64, 64), (64, 32), (32, 32)]


def test_a_kernel_without_smaller_tiles_is_launched_once_and_reported():
    kernel = Kernel(lambda *_: (9, 9))
    launch(kernel, TILES, lambda _: (1,), (torch.zeros(4), 3), R=1, C=1)
    assert len(kernel.launches) == 1
    assert backend.SPILLED == ["some_kernel spills in a loop at 16x128 and at all smaller tiles"]


def test_the_interpreter_compiles_nothing():
    class Interpreted(Kernel):
        def __getitem__(self, grid):
            run = super().__getitem__(grid)
            return lambda *arguments, **constants: run(*arguments, **constants) and None

    assert run(Interpreted(lambda *_: (9, 9))) == [(64, 64)]
    assert not module._seen


@pytest.mark.parametrize(
    ("tile", "sizes"),
    [
        (Tile(128, 32, 64, 8), ["64x32", "32x32", "32x16", "16x16"]),
        (PixelTile(32, 64, 8), ["32x32", "32x16", "16x16"]),
        (TILES, []),
    ],
)
def test_smaller_tiles(tile, sizes):
    smaller = []
    while (tile := tile.smaller()) is not None:
        smaller.append(str(tile))
    assert smaller == sizes


def test_triton_counts_the_spills_of_what_it_loads():
    source = inspect.getsource(triton.compiler.CompiledKernel)
    assert "self.n_spills" in source
    assert "asm" in source
