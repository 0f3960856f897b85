"""Processes that share the work, on any backend of torch.distributed."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan._checks import InputError

_STORE_SECONDS = 20


def _end_gloo() -> None:
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


# Threads of gloo that outlive the process group now and then abort the process as Python ends, without fastgan too. So
# a group that is left is destroyed at exit; and torch.distributed.nn is imported before there is one, since default
# arguments there keep the group of the time of the import, which torch.compile makes.
if dist.is_available():
    import torch.distributed.nn

    atexit.register(_end_gloo)


@dataclass(frozen=True)
class World:
    """This process's rank among the processes of ``group``, or of the default process group, that share the work."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """Return this process's part of ``range(n)``: one block, in the order of the ranks."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise an ``InputError`` of one process's block in all of them, so that none waits for one that has given up.

        Every process must enter the block; nothing within it may wait for another process.
        """
        problem = None
        try:
            yield
        except InputError as error:
            if self.size == 1:
                raise
            problem = str(error)
        problems = [found for found in self.gather(problem) if found is not None]
        if problems:
            raise InputError(problems[0])

    def gather(self, value: Any) -> list[Any]:
        """Return ``value`` of every process, in rank order."""
        return [value] if self.size == 1 else gather_objects(value, self.group)


def current_world(group: dist.ProcessGroup | None = None) -> World:
    """Return the processes of ``group``, of the default process group if it is initialized, or this process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(group), dist.get_world_size(group), group)


@contextmanager
def launched_world(device: torch.device) -> Iterator[World]:
    """Yield the world that torchrun started this process in; its process group exists while the block runs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not dist.is_available() or dist.is_initialized():
        yield current_world()
        return
    # torchrun ends all if one dies; one that takes long, as for a score, must not end the others.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()


def told_by_one(line: str, tell: Callable[[str], None]) -> None:
    """Call ``tell(line)`` in the first of the processes started by torchrun that gets here with this line.

    The others return after it has. If they cannot reach each other, each calls ``tell``. Needs no process group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        tell(line)
        return
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_STORE_SECONDS)))
        if store.add(f"fastgan/comers to {line}", 1) > 1:
            store.wait([f"fastgan/told {line}"])
            return
    except (RuntimeError, ValueError):  # there is no store, or the first process did not get through
        tell(line)
        return
    tell(line)
    store.set(f"fastgan/told {line}", "")


def local_device() -> torch.device:
    """Return this process's GPU, by its local rank, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """Return the rows (n_i, dim) of all processes in rank order as one (sum n_i, dim), the same on each process."""
    if world.size == 1:
        return rows
    return torch.cat(gather_parts(rows, world.gather(len(rows)))).to(rows.device)


def gather_parts(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the rows (count, dim) of each process, on the device of collectives; they travel padded to one size."""
    padded = torch.zeros(max(counts), rows.shape[1], dtype=rows.dtype, device=collective_device(group))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return ``value`` of every process of ``group``, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device on which tensors must be for a collective call."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
