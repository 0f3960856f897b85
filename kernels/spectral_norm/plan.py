"""Arguments of the grouped spectral-norm kernels for a network: its geometry, split over programs and pointers."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Entries of a layer's row in the geometry table.
FIELDS = (
    "rows",
    "columns",
    "inner",  # column c is (a, b) = (c % inner, c // inner)
    "stride_row",
    "stride_a",
    "stride_b",
    "vector_a",  # entry of v that belongs to (a, b): a * vector_a + b * vector_b
    "vector_b",
    "u_offset",
    "v_offset",
    "s_tiles",
    "s_chunks",
    "s_partials",
    "t_tiles",
    "t_chunks",
    "t_partials",
    "tile_begin",
    "tile_count",
)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options of all kernels.

    A program for W v owns ``block_r`` rows and walks over ``chunk_c`` columns; one for W^T u owns ``block_c`` columns
    and walks over ``chunk_r`` rows; one of the gradients owns ``tile_r`` x ``chunk_tile`` entries, one that scales
    ``block_flat``.
    """

    block_r: int = 16
    block_c: int = 128
    chunk_r: int = 512
    chunk_c: int = 2048
    tile_r: int = 8
    chunk_tile: int = 1024
    block_flat: int = 4096
    reduce_parts: int = 2
    reduce_block: int = 1024
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        return f"{self.block_r}x{self.block_c}"

    def constants(self) -> dict[str, int]:
        """Return nothing: each kernel has its own part of the sizes."""
        return {}

    def smaller(self) -> None:
        """Return None: plans are made for these sizes, and a power iteration must not be made twice."""


TILES = Tiles()


@dataclass(frozen=True)
class Layout:
    """Shape and strides of a weight as a matrix whose columns are walked in memory order, at most two levels deep."""

    rows: int
    columns: int
    inner: int
    stride_row: int
    stride_a: int
    stride_b: int
    vector_a: int
    vector_b: int


def layout_of(shape: Sequence[int], strides: Sequence[int], dim: int) -> Layout | None:
    """Return the layout of a weight, or None if its columns take more than two levels of strides."""
    vector_strides, columns = {}, 1
    for d in reversed([d for d in range(len(shape)) if d != dim]):
        vector_strides[d] = columns
        columns *= shape[d]
    order = sorted((d for d in vector_strides if shape[d] > 1), key=lambda d: strides[d])
    levels: list[tuple[int, int, int]] = []  # size, stride, stride in v; innermost first
    for d in order:
        size, stride, vector = shape[d], strides[d], vector_strides[d]
        if levels and stride == levels[-1][0] * levels[-1][1] and vector == levels[-1][0] * levels[-1][2]:
            levels[-1] = (levels[-1][0] * size, *levels[-1][1:])
        else:
            levels.append((size, stride, vector))
    if len(levels) > 2:
        return None
    (inner, stride_a, vector_a), (_, stride_b, vector_b) = (levels + [(1, 0, 0)] * 2)[:2]
    return Layout(shape[dim], columns, inner, strides[dim], stride_a, stride_b, vector_a, vector_b)


@dataclass(frozen=True)
class Plan:
    """Device tables for weights of given layouts; ``*_tiles`` map each program to its part of a layer."""

    geometry: Tensor  # (layers, FIELDS) int64
    s_tiles: Tensor  # (programs, 3) int32: layer, first row, chunk of columns
    t_tiles: Tensor  # (programs, 3) int32: layer, first column, chunk of rows
    tiles: Tensor  # (programs, 3) int32: layer, first row, first column
    flat_tiles: Tensor  # (programs, 3) int32: layer, block, 0
    partials: int
    u_size: int
    v_size: int


@functools.cache
def walk_of(
    forms: tuple[tuple[Sequence[int], Sequence[int]], ...], dims: tuple[int, ...], device: torch.device
) -> tuple[frozenset[int], Plan]:
    """For weights of these shapes and strides: which ones must be made contiguous to be walked, and the plan then."""
    layouts, copied = [], set()
    for i, ((shape, strides), dim) in enumerate(zip(forms, dims, strict=True)):
        layout = layout_of(shape, strides, dim) if _is_dense(shape, strides) else None
        if layout is None:
            copied.add(i)
            layout = layout_of(shape, [math.prod(shape[d + 1 :]) for d in range(len(shape))], dim)
        assert isinstance(layout, Layout)
        layouts.append(layout)
    return frozenset(copied), plan_for(tuple(layouts), device)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether the entries fill a contiguous range of memory, each place once."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


@functools.cache  # for good: CUDA graphs keep the addresses
def plan_for(layouts: tuple[Layout, ...], device: torch.device, sizes: Tiles = TILES) -> Plan:
    """The tables for weights of these layouts; made once, whatever their addresses."""
    rows_of_geometry: list[list[int]] = []
    s_tiles: list[tuple[int, int, int]] = []
    t_tiles: list[tuple[int, int, int]] = []
    tiles: list[tuple[int, int, int]] = []
    flat_tiles: list[tuple[int, int, int]] = []
    u_offset = v_offset = s_partials = t_partials = 0
    for i, layout in enumerate(layouts):
        rows, columns = layout.rows, layout.columns
        s_layer = _grid(i, rows, sizes.block_r, columns, sizes.chunk_c)
        t_layer = _grid(i, columns, sizes.block_c, rows, sizes.chunk_r)
        layer = [(i, r, c) for r in range(0, rows, sizes.tile_r) for c in range(0, columns, sizes.chunk_tile)]
        s_chunks, t_chunks = -(-columns // sizes.chunk_c), -(-rows // sizes.chunk_r)
        rows_of_geometry.append(
            [
                *(rows, columns, layout.inner, layout.stride_row, layout.stride_a, layout.stride_b),
                *(layout.vector_a, layout.vector_b, u_offset, v_offset),
                *(len(s_layer), s_chunks, s_partials, len(t_layer), t_chunks, t_partials, len(tiles), len(layer)),
            ]
        )
        s_tiles += s_layer
        t_tiles += t_layer
        tiles += layer
        flat_tiles += [(i, block, 0) for block in range(-(-rows * columns // sizes.block_flat))]
        u_offset, v_offset = u_offset + rows, v_offset + columns
        s_partials, t_partials = s_partials + s_chunks * rows, t_partials + t_chunks * columns

    def kept(rows: list[Any], dtype: torch.dtype) -> Tensor:
        return _kept(torch.tensor(rows, dtype=dtype), device, for_all_streams=True)

    return Plan(
        geometry=kept(rows_of_geometry, torch.int64),
        s_tiles=kept(s_tiles, torch.int32),
        t_tiles=kept(t_tiles, torch.int32),
        tiles=kept(tiles, torch.int32),
        flat_tiles=kept(flat_tiles, torch.int32),
        partials=max(s_partials, t_partials),
        u_size=u_offset,
        v_size=v_offset,
    )


def _grid(layer: int, owned: int, block: int, walked: int, chunk: int) -> list[tuple[int, int, int]]:
    return [(layer, start, part) for part in range(-(-walked // chunk)) for start in range(0, owned, block)]


@dataclass(frozen=True)
class Table:
    """Addresses of tensors on the device."""

    pointers: Tensor  # (lists + 1, layers) int64; the last row, of zeros, counts programs that are done
    source: Tensor  # on the host, pinned if the device is a GPU: a captured graph copies from it at each replay
    aligned: bool  # all addresses are multiples of 16


_tables: OrderedDict[tuple[torch.device, tuple[int, ...], int], Table] = OrderedDict()
_in_graphs: dict[int, Table | Tensor] = {}
_TABLES = 512


def table_of(*lists: Sequence[Tensor]) -> Table:
    """The pointer table of these tensors, reused on one stream while their addresses are the same.

    Each stream has tables of its own. So a table is copied, read, counted in and freed in the order of one stream, and
    the programs of another never count in the same row. A CUDA graph that is being captured takes the table of earlier
    calls away from them for good; the begin of a capture waits for all streams. If there is none, the graph copies the
    table to memory of its own pool at each replay.
    """
    device = lists[0][0].device
    addresses = tuple([tensor.data_ptr() for tensors in lists for tensor in tensors])
    key = (device, addresses, _stream_of(device))
    capturing = _is_capturing(device)
    if capturing:  # on a stream of its own
        key = next((other for other in reversed(_tables) if other[:2] == key[:2]), key)
    table = _tables.pop(key, None)
    if table is not None:
        if capturing:
            _in_graphs[id(table)] = table
        else:
            _tables[key] = table  # now the one used last
        return table
    rows = [*addresses, *[0] * len(lists[0])]
    source = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").view(-1, len(lists[0]))
    aligned = all(address % 16 == 0 for address in addresses)
    if capturing:
        _in_graphs[id(source)] = source
        return Table(source.to(device, non_blocking=True), source, aligned)
    table = _tables[key] = Table(_kept(source, device), source, aligned)
    if len(_tables) > _TABLES:
        _tables.popitem(last=False)
    return table


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream_of(device: torch.device) -> int:
    """The address of the current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _kept(source: Tensor, device: torch.device, *, for_all_streams: bool = False) -> Tensor:
    """A copy on ``device`` outside the memory pools of CUDA graphs, which serve the thread that prepares a graph.

    With ``for_all_streams`` it is complete when this returns, unless a graph is captured.
    """
    if device.type != "cuda":
        return source.to(device)
    stream, waits = torch.cuda.current_stream(device), for_all_streams and not _is_capturing(device)

    def copy() -> Tensor:
        with torch.cuda.stream(stream):
            copied = source.to(device, non_blocking=True)
            if waits:
                stream.synchronize()
            return copied

    return _other_thread().submit(copy).result()


@functools.cache
def _other_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fastgan-tables")
