"""Replay of a function as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2


class CudaGraph:
    """``function`` captured for inputs like ``inputs``; calls copy inputs in and replay.

    Args:
        function: maps inputs by name to tensors; draws from ``rng`` alone and changes ``state`` alone.
        inputs: an example.
        state: tensors that every replay changes.
        rng: a generator of the device. Each replay draws the same numbers as an eager call and leaves the same state.
        pool: memory shared with other graphs, of which one runs at a time.

    Attributes:
        outputs: tensors that ``function`` returned; each replay writes them anew.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor]], list[Tensor]],
        inputs: Mapping[str, Tensor],
        state: Sequence[Tensor],
        rng: torch.Generator,
        pool: Any,
    ) -> None:
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        self._state = list(state)
        # Warm up, so that libraries choose their algorithms and kernels are built outside the graph; undo its effects.
        kept, rng_state = [t.detach().clone() for t in state], rng.get_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function(self._inputs)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            with torch.no_grad():
                for tensor, value in zip(state, kept, strict=True):
                    tensor.copy_(value)
            rng.set_state(rng_state)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(rng)
        # Other threads, such as those of a process group or of a data loader, may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = function(self._inputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        for name, value in inputs.items():
            self._inputs[name].copy_(value, non_blocking=True)
        self._graph.replay()
        torch.autograd.graph.increment_version(self._state)
        return self.outputs
