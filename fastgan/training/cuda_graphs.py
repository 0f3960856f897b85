"""Replaying a step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.training.gan import Batch, Terms

WARM_UP = 2


class CudaGraph:
    """``function`` captured for batches like ``batch``; calls copy a batch in, replay, and copy the terms out.

    Args:
        function: from a batch to scalars; draws from ``rng`` alone and changes ``tensors`` alone.
        batch: an example.
        tensors: state, of which every replay changes the tensors given here.
        rng: a generator of the device: each replay draws what an eager call would draw, and leaves it where that would.
        pool: memory shared with the graphs of other steps, of which one runs at a time.
    """

    def __init__(
        self,
        function: Callable[[Batch], Terms],
        batch: Batch,
        tensors: Sequence[Tensor],
        rng: torch.Generator,
        pool: Any,
    ) -> None:
        self._batch = {name: value.clone() for name, value in batch.items()}
        self.tensors = list(tensors)
        self._warm_up(function, rng)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(rng)
        with torch.cuda.graph(self._graph, pool=pool):
            self._terms = function(self._batch)

    def __call__(self, batch: Batch) -> Terms:
        for name, value in batch.items():
            self._batch[name].copy_(value, non_blocking=True)
        self._graph.replay()
        torch.autograd.graph.increment_version(self.tensors)
        return {name: term.clone() for name, term in self._terms.items()}

    def _warm_up(self, function: Callable[[Batch], Terms], rng: torch.Generator) -> None:
        """Let libraries choose their algorithms, and kernels be built, outside the graph; the state stays as it was."""
        kept, rng_state = [t.detach().clone() for t in self.tensors], rng.get_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function(self._batch)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            with torch.no_grad():
                for tensor, value in zip(self.tensors, kept, strict=True):
                    tensor.copy_(value)
            rng.set_state(rng_state)
