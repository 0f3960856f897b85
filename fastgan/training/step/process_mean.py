"""Means of gradients, buffers and losses over the processes that share a batch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan.distributed import World, gather_objects
from fastgan.training.gan import Terms

BUCKET_BYTES = 25 << 20


@dataclass
class Shared:
    """Tensors that a process computed on its part of a batch, or their means over all processes.

    Attributes:
        gradients: of the loss in the weights that it reaches.
        buffers: floating-point buffers of both networks: running statistics, singular vectors.
        terms: of the loss.
    """

    gradients: list[Tensor]
    buffers: list[Tensor]
    terms: Terms

    def tensors(self) -> list[Tensor]:
        """Return all tensors, terms sorted by name: processes may have computed them in another order."""
        return [*self.gradients, *self.buffers, *(self.terms[name] for name in sorted(self.terms))]

    def replaced(self, tensors: Sequence[Tensor]) -> Shared:
        """The same with ``tensors`` in place of :meth:`tensors`."""
        n, m = len(self.gradients), len(self.gradients) + len(self.buffers)
        by_name = dict(zip(sorted(self.terms), tensors[m:], strict=True))
        return Shared(list(tensors[:n]), list(tensors[n:m]), {name: by_name[name] for name in self.terms})


class ProcessMean:
    """Weighted mean over the processes of ``world``, in few large collectives.

    Every process gives tensors of the same shapes and dtypes in the same order, and gets the same numbers back. Packing
    and unpacking can be captured; :meth:`reduce_` stands between graphs.

    Args:
        world: the processes.
        bucket_bytes: a bucket ends with the tensor that makes it at least this large.
        device: the device of :attr:`weight`.

    Attributes:
        weight: this process's share of the batch, a scalar tensor; all shares add up to 1.
    """

    def __init__(
        self, world: World, bucket_bytes: int = BUCKET_BYTES, device: torch.device | str | None = None
    ) -> None:
        self.world, self.bucket_bytes = world, bucket_bytes
        self._share = 1 / world.size
        self.weight = torch.full((), self._share, dtype=torch.float64, device=device)
        self._host_group: Any = world.group
        if world.size > 1 and dist.get_backend(world.group) != "gloo":  # messages between hosts need no GPU
            ranks = dist.get_process_group_ranks(world.group or dist.group.WORLD)
            self._host_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    def set_share(self, share: float) -> None:
        """Set :attr:`weight`."""
        if share != self._share:
            self._share = share
            self.weight.fill_(share)

    def agree(self, description: Mapping[str, Any], *numbers: int) -> list[list[int]]:
        """Compare a description with those of the other processes. Returns the numbers of each process.

        Raises:
            RuntimeError: the descriptions differ; raised by all processes, with the first difference.
        """
        if self.world.size == 1:
            return [list(numbers)]
        own = torch.tensor([zlib.crc32(repr(description).encode()), *numbers], dtype=torch.int64)
        all_ = [torch.empty_like(own) for _ in range(self.world.size)]
        dist.all_gather(all_, own, group=self._host_group)
        rows = [row.tolist() for row in all_]
        if len({row[0] for row in rows}) > 1:
            descriptions = gather_objects(dict(description), self._host_group)
            for rank, other in enumerate(descriptions):
                for key in [*descriptions[0], *other]:
                    ours, theirs = descriptions[0].get(key), other.get(key)
                    if ours != theirs:
                        ours, theirs = _without_common(ours, theirs)
                        told = f"rank 0 has {ours}, rank {rank} has {theirs}"
                        raise RuntimeError(f"processes that share a batch must agree in {key}: {told}")
        return [row[1:] for row in rows]

    def __call__(self, shared: Shared) -> Shared:
        buckets = self.pack(shared.tensors())
        self.reduce_(buckets)
        return shared.replaced(self.unpack(buckets, shared.tensors()))

    def pack(self, tensors: Sequence[Tensor], weight: Tensor | None = None) -> list[Tensor]:
        """Flat buckets, each of one dtype, with this process's part of the means."""
        buckets = [torch.cat([tensors[i].detach().reshape(-1) for i in indices]) for indices in self._buckets(tensors)]
        weight = self.weight if weight is None else weight
        return [bucket * weight.to(bucket.dtype) for bucket in buckets]

    def reduce_(self, buckets: Sequence[Tensor]) -> None:
        """Sum each bucket over the processes, in place."""
        for work in [dist.all_reduce(bucket, group=self.world.group, async_op=True) for bucket in buckets]:
            work.wait()

    def unpack(self, buckets: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Views of ``buckets`` with the shapes and dtypes of ``like``."""
        tensors: dict[int, Tensor] = {}
        for bucket, indices in zip(buckets, self._buckets(like), strict=True):
            for i, part in zip(indices, bucket.split([like[i].numel() for i in indices]), strict=True):
                tensors[i] = part.view(like[i].shape)
        return [tensors[i] for i in range(len(like))]

    def _buckets(self, tensors: Sequence[Tensor]) -> list[list[int]]:
        """Indices of the tensors in each bucket."""
        buckets: list[list[int]] = []
        filling: dict[torch.dtype, tuple[list[int], int]] = {}
        for i, tensor in enumerate(tensors):
            indices, size = filling.get(tensor.dtype, ([], self.bucket_bytes))
            if size >= self.bucket_bytes:
                indices, size = [], 0
                buckets.append(indices)
            indices.append(i)
            filling[tensor.dtype] = indices, size + tensor.numel() * tensor.element_size()
        return buckets


def floating_buffers(networks: Mapping[str, nn.Module]) -> list[Tensor]:
    """Return the buffers that a step may change and that depend on the batch."""
    return [b for network in networks.values() for b in network.buffers() if b.is_floating_point()]


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor], world: World) -> None:
    """Give every process the values of the first."""
    for tensor in tensors if world.size > 1 else ():
        value = tensor.detach().contiguous()
        dist.broadcast(value, group=world.group, group_src=0)
        tensor.copy_(value)


@torch.no_grad()
def broadcast_optimizer_(optimizer: torch.optim.Optimizer, world: World) -> None:
    """Give every process's optimizer the states of the first's."""
    if world.size == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [dict(optimizer.state.get(p, {})) for p in parameters]
    described = [
        {key: (v.shape, v.dtype, v.device.type == "cpu") if isinstance(v, Tensor) else v for key, v in state.items()}
        for state in states
    ]
    described = gather_objects(described, world.group)[0]
    for p, wanted, own in zip(parameters, described, states, strict=True):
        state: dict[str, Any] = {}
        for key, value in wanted.items():
            if isinstance(value, tuple) and len(value) == 3 and isinstance(value[1], torch.dtype):
                shape, dtype, on_cpu = value
                held = own.get(key)
                if not isinstance(held, Tensor) or held.shape != shape or held.dtype != dtype:
                    held = torch.zeros(shape, dtype=dtype, device="cpu" if on_cpu else p.device)
                    held = torch.zeros_like(p, dtype=dtype) if shape == p.shape else held
                sent = held.to(p.device).contiguous()
                dist.broadcast(sent, group=world.group, group_src=0)
                value = held.copy_(sent)
            state[key] = value
        if wanted or own:
            optimizer.state[p] = state


def _without_common(a: Any, b: Any) -> tuple[Any, Any]:
    """Return two lists without their common entries, unless only their order differs."""
    if isinstance(a, list) and isinstance(b, list) and set(map(repr, a)) != set(map(repr, b)):
        return [x for x in a if x not in b] or "none of these", [x for x in b if x not in a] or "none of these"
    return a, b
