"""Statistics of images that several processes share, on any backend of torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.metrics.errors import InputError

if TYPE_CHECKING:
    from fastgan.metrics.stats import FeatureStats

_STORE_SECONDS = 20


@dataclass(frozen=True)
class World:
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """The part of ``range(n)`` that is this process's: one block, in the order of the ranks."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Where the block raises an ``InputError`` in one process, all raise it, so that none waits for one that has
        given up. Every process must come here; nothing within the block may wait for another."""
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
        """``value`` of every process, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def current_world() -> World:
    """The default process group where one is initialised; else a world of one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def launched_world(device: torch.device) -> Iterator[World]:
    """The world that torchrun started this process in, its process group up while the block runs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not dist.is_available() or dist.is_initialized():
        yield current_world()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()


def told_by_one(line: str, tell: Callable[[str], None]) -> None:
    """``tell(line)`` in one of the processes that torchrun started, the first to come here with this line; the others
    return after it has. Where they cannot reach each other, each tells. Needs no process group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        tell(line)
        return
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_STORE_SECONDS)))
        if store.add(f"fastgan/comers to {line}", 1) > 1:
            store.wait([f"fastgan/told {line}"])
            return
    except (RuntimeError, ValueError):  # no store, or nobody who has told
        tell(line)
        return
    tell(line)
    store.set(f"fastgan/told {line}", "")


def local_device() -> torch.device:
    """The GPU of this process where there is one for each of the node's processes, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def all_reduce_stats(stats: FeatureStats, group: dist.ProcessGroup | None = None) -> None:
    """Make ``stats`` of every process of ``group`` those of all their vectors together; see
    :meth:`FeatureStats.all_reduce`."""
    from fastgan.metrics.stats import check_comparable

    headers = _gather_objects(_header(stats), group)
    _check_headers(headers)
    total = _empty_like(headers)
    check_comparable(stats, total)
    if not total.n:
        return
    device = _collective_device(group)
    home = stats.device or device
    if total.n <= (total.dim or 0):
        parts = _gather_rows(stats.rows(), [header["n"] for header in headers], total.dim or 0, device, group)
        stats.replace_by_rows(torch.cat(parts).to(home), like=total)
        return
    n, mean, scatter = stats.moments(total.dim or 0, device)
    means = _gather_rows(mean[None], [1] * len(headers), total.dim or 0, device, group)
    counts = [header["n"] for header in headers]
    joint_mean = _joint_mean(counts, means)
    delta = mean - joint_mean
    scatter.addr_(delta, delta, alpha=n)
    dist.all_reduce(scatter, group=group)
    stats.replace_by_moments(total.n, joint_mean.to(home), scatter.to(home), like=total)


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """The rows (n_i, dim) of all processes in rank order, (sum n_i, dim), the same on each."""
    if world.size == 1:
        return rows
    shapes = world.gather((rows.shape[0], rows.shape[1]))
    dim = max(shape[1] for shape in shapes)
    parts = _gather_rows(rows, [shape[0] for shape in shapes], dim, _collective_device(None), None)
    return torch.cat(parts).to(rows.device)


def _header(stats: FeatureStats) -> dict[str, Any]:
    return {key: getattr(stats, key) for key in ("n", "dim", "backbone", "resize", "dtype", "precision")}


def _check_headers(headers: Sequence[dict[str, Any]]) -> None:
    for rank, header in enumerate(headers):
        if header["n"] is None:
            raise InputError(f"cannot all_reduce statistics whose n is unknown, as they are in process {rank}")
    for key in ("dim", "backbone", "resize"):
        known = {header[key] for header in headers if header[key] is not None}
        if len(known) > 1:
            raise InputError(f"the processes' statistics differ in {key}: {', '.join(sorted(map(str, known)))}")


def _empty_like(headers: Sequence[dict[str, Any]]) -> FeatureStats:
    """Statistics with the joint header and nothing in them; ``n`` is the joint number."""
    from fastgan.metrics.stats import FeatureStats, joint_precision

    known = {key: next((h[key] for h in headers if h[key] is not None), None) for key in headers[0]}
    total = FeatureStats(known["dim"], backbone=known["backbone"], resize=known["resize"])
    total.dtype, total.precision = known["dtype"], joint_precision(header["precision"] for header in headers)
    total._n = sum(header["n"] for header in headers)
    return total


def _joint_mean(counts: Sequence[int], means: Sequence[Tensor]) -> Tensor:
    mean, n = torch.zeros_like(means[0][0]), 0
    for count, part in zip(counts, means, strict=True):
        if count:
            n += count
            mean = mean + (part[0] - mean) * (count / n)
    return mean


def _gather_rows(
    rows: Tensor, counts: Sequence[int], dim: int, device: torch.device, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Rows of every process, padded to one size on the way."""
    padded = torch.zeros(max(counts), dim, dtype=rows.dtype, device=device)
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must be to be sent."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
