"""Means of gradients, buffers and losses over the processes that share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.distributed import World
from fastgan.training.gan import GAN, Terms

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
        return [*self.gradients, *self.buffers, *self.terms.values()]

    def replaced(self, tensors: Sequence[Tensor]) -> Shared:
        """The same with ``tensors`` in place of :meth:`tensors`."""
        n, m = len(self.gradients), len(self.gradients) + len(self.buffers)
        return Shared(list(tensors[:n]), list(tensors[n:m]), dict(zip(self.terms, tensors[m:], strict=True)))


class ProcessMean:
    """Mean over the processes of ``world``, in few large collectives.

    Every process gives tensors of the same shapes and dtypes in the same order, and gets the same numbers back. Packing
    and unpacking can be captured; :meth:`reduce_` stands between graphs.

    Args:
        world: the processes, those of the default process group.
        bucket_bytes: a bucket ends with the tensor that makes it at least this large.
    """

    def __init__(self, world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.world, self.bucket_bytes = world, bucket_bytes

    def __call__(self, shared: Shared) -> Shared:
        buckets = self.pack(shared.tensors())
        self.reduce_(buckets)
        return shared.replaced(self.unpack(buckets, shared.tensors()))

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Flat buckets, each of one dtype, with this process's part of the means."""
        return [
            torch.cat([tensors[i].detach().reshape(-1) for i in indices]) / self.world.size
            for indices in self._buckets(tensors)
        ]

    def reduce_(self, buckets: Sequence[Tensor]) -> None:
        """Sum each bucket over the processes, in place."""
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
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


def floating_buffers(gan: GAN) -> list[Tensor]:
    """Buffers that a step may change, and that differ where batches differ."""
    return [b for network in (gan.generator, gan.discriminator) for b in network.buffers() if b.is_floating_point()]


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor], world: World) -> None:
    """Give every process the values of the first."""
    for tensor in tensors if world.size > 1 else ():
        value = tensor.detach().contiguous()
        dist.broadcast(value, 0)
        tensor.copy_(value)
