"""One network's update as one graph over fake tensors: loss, penalties, backward, optimizer, clipping, average.

``make_fx`` runs the real autograd engine while it records ATen ops, so that a gradient penalty's double backward,
custom ops and the optimizer come out as one flat graph without autograd. All state goes in as arguments and is updated
in place. Tracing runs on fake tensors and changes no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan.training.gan import GAN, Batch, Draws, Terms, gradients_of
from fastgan.training.step.cuda_graphs import CudaGraph
from fastgan.training.step.eager import Update
from fastgan.training.step.optimizers import OptimizerState
from fastgan.training.step.process_mean import Shared, floating_buffers


class CapturedUpdate:
    """``update`` as one compiled graph; if processes share a batch, as two with their exchange between them.

    Args:
        update: what to capture.
        batch, draws: examples of the arguments of a call.
        compile: maps a graph of flat arguments and examples of these to a function.

    Raises:
        CaptureError: the optimizer has no captured form.
    """

    def __init__(
        self,
        update: Update,
        batch: Batch,
        draws: Draws,
        compile: Callable[[GraphModule, list[Tensor]], Callable[..., Any]],
    ) -> None:
        self._update, self._trained = update, update.trained()
        self._optimizer = OptimizerState(update.optimizer, self._trained)
        self._networks = _Networks(update.gan)
        self._modules, self._weights = list(self._networks.modules()), list(update.network.parameters())
        self._slots = _slots(self._networks)
        self._replay: tuple[list[Tensor], CudaGraph, CudaGraph | None] | None = None
        state, mean = self._state(), update.mean
        n, m = len(state), len(state) + len(batch)

        def first(*flat: Tensor) -> list[Tensor]:
            """The whole update; if processes share a batch, all that comes before their exchange, packed for it."""
            computed = self._differentiated(
                flat[:n], dict(zip(batch, flat[n:m], strict=True)), dict(zip(draws, flat[m:], strict=True))
            )
            self._names = list(computed.terms)
            if mean is not None:
                self._computed = computed
                return mean.pack(computed.tensors())
            self._apply(flat[:n], computed.gradients)
            return list(computed.terms.values())

        def second(*flat: Tensor) -> list[Tensor]:
            """The update by the means over the processes."""
            assert mean is not None
            common = self._computed.replaced(mean.unpack(flat[n:], self._computed.tensors()))
            torch._foreach_copy_(self._buffers(flat[:n]), common.buffers)
            self._apply(flat[:n], common.gradients)
            return [term.clone() for term in common.terms.values()]

        arguments = [*state, *batch.values(), *draws.values()]
        graph = _graph_of(first, arguments)
        self._first = torch.no_grad()(compile(graph, arguments))
        self._second: Callable[..., Any] | None = None
        if mean is not None:
            (output,) = (node for node in graph.graph.nodes if node.op == "output")
            buckets = [node.meta["val"] for node in output.args[0]]
            arguments = [*state, *(torch.zeros(b.shape, dtype=b.dtype, device=b.device) for b in buckets)]
            self._second = torch.no_grad()(compile(_graph_of(second, arguments), arguments))
        self._key = self._key_of(batch)

    def fits(self, batch: Batch) -> bool:
        """Whether the graph serves this batch, with the optimizer options, module modes and frozen weights of now."""
        return self._key_of(batch) == self._key

    def __call__(self, batch: Batch, draws: Draws) -> Terms:
        """Update the network once. Returns the terms of its loss."""
        state = self._state()
        outputs = self._first(*state, *batch.values(), *draws.values())
        return self._terms(outputs, lambda: self._second(*state, *outputs))  # type: ignore[misc]

    def capture_replay(
        self, batch: Batch, draw: Callable[[Batch], Draws], rng: torch.Generator, pool: Any
    ) -> Callable[[Batch], Terms]:
        """The same update as CUDA graphs that hold the draws too, captured anew if state tensors have been replaced."""
        state = self._state()
        if self._replay is None or not all(a is b for a, b in zip(state, self._replay[0], strict=True)):
            self._replay = None  # its memory goes back to the pool first
            first = CudaGraph(
                lambda batch: list(self._first(*state, *batch.values(), *draw(batch).values())), batch, state, rng, pool
            )
            second = None
            if self._second is not None:
                run, buckets = self._second, first.outputs
                second = CudaGraph(lambda _: list(run(*state, *buckets)), {}, state, rng, pool)
            self._replay = state, first, second
        _, first, second = self._replay

        def replay(batch: Batch) -> Terms:
            terms = self._terms(first(batch), lambda: second({}))  # type: ignore[misc]
            return {name: term.clone() for name, term in terms.items()}

        return replay

    def _terms(self, outputs: Sequence[Tensor], second: Callable[[], Sequence[Tensor]]) -> Terms:
        """Terms of the loss by name, after the exchange and the second graph if processes share a batch."""
        if self._update.mean is not None:
            self._update.mean.reduce_(outputs)
            outputs = second()
        return dict(zip(self._names, outputs, strict=True))

    def _key_of(self, batch: Batch) -> tuple[Any, ...]:
        shapes = tuple((name, tuple(t.shape), t.stride(), t.dtype, t.device) for name, t in batch.items())
        modes = tuple([module.training for module in self._modules])
        trained = tuple([weight.requires_grad for weight in self._weights])
        return shapes, modes, trained, self._optimizer.options()

    def _state(self) -> list[Tensor]:
        """All state as it is now, in the order of the graph's first arguments."""
        self._optimizer.refresh()
        networks = [owner[key] for owner, key in self._slots.values()]
        averages = self._update.ema.tensors() if self._update.ema else []
        return [*networks, *self._optimizer.tensors(), *self._optimizer.rates, *averages]

    def _differentiated(self, state: Sequence[Tensor], batch: Batch, draws: Draws) -> Shared:
        traced = self._traced(state)
        with torch.enable_grad():
            terms = self._holding(state, self._update.loss, batch, draws)
            gradients = gradients_of(terms, [traced[id(p)] for p in self._trained])
        self._reached = [p for p, g in zip(self._trained, gradients, strict=True) if g is not None]
        detached = {name: term.detach() for name, term in terms.items()}
        return Shared([g for g in gradients if g is not None], self._buffers(state), detached)

    @torch.no_grad()
    def _apply(self, state: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        n = len(self._slots)
        m = n + len(self._optimizer.tensors())
        k = m + len(self._optimizer.rates)
        by_id = {id(p): gradient for p, gradient in zip(self._reached, gradients, strict=True)}
        self._optimizer.update(self._traced(state), by_id, state[n:m], state[m:k])
        self._holding(state, self._update.finish, state[k:])

    def _traced(self, state: Sequence[Tensor]) -> dict[int, Tensor]:
        """Map the id of each tensor of the networks to the one in ``state`` that stands for it."""
        return {id(owner[key]): tensor for (owner, key), tensor in zip(self._slots.values(), state, strict=False)}

    def _buffers(self, state: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that stand for :func:`fastgan.training.step.process_mean.floating_buffers`."""
        traced = self._traced(state)
        return [traced[id(buffer)] for buffer in floating_buffers(self._update.gan)]

    def _holding(self, state: Sequence[Tensor], function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` while the networks hold the tensors of ``state``."""
        return functional_call(self._networks, dict(zip(self._slots, state, strict=False)), (function, *args))


class _Networks(nn.Module):
    """Both networks as one module, whose forward calls any function."""

    def __init__(self, gan: GAN) -> None:
        super().__init__()
        self.generator, self.discriminator = gan.generator, gan.discriminator

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def _slots(networks: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Map each tensor's name to the dictionary that holds it and its key: reading there is quick and never stale."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    for prefix, module in networks.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots[f"{prefix}.{key}"] = (held, key)
    return slots


def _graph_of(function: Callable[..., Any], arguments: Sequence[Tensor]) -> GraphModule:
    # Constants that a loss closes over may stay what they are.
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
