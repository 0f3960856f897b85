"""One network's update as one graph over fake tensors: loss, penalties, backward, optimiser, clipping, average.

``make_fx`` runs the real autograd engine while it records ATen ops, so that a gradient penalty's double backward,
custom ops and the optimiser come out as one flat graph without autograd. All state goes in as arguments and is updated
in place. Tracing runs on fake tensors and changes no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan.losses.penalties import clip_weights_
from fastgan.training.ema import EMA
from fastgan.training.gan import Batch, Draws, Gan, Terms, gradients_of
from fastgan.training.step.optimizer_state import OptimizerState
from fastgan.training.step.process_mean import ProcessMean, Shared, floating_buffers


@dataclass
class Traced:
    """An update as graphs of flat arguments, with examples of these.

    Attributes:
        graph: from :meth:`Update.tensors`, then the batch's, then the draws', to the terms of the loss. Where several
            processes share a batch, to buckets for :meth:`fastgan.training.step.process_mean.ProcessMean.reduce_`.
        names: of the terms.
        second: None, or from :meth:`Update.tensors`, then the reduced buckets, to the terms.
    """

    graph: GraphModule
    arguments: list[Tensor]
    names: list[str]
    second: GraphModule | None = None
    second_arguments: list[Tensor] = field(default_factory=list)


class Update:
    """One update of the network ``name`` of ``gan`` as a function of tensors.

    Args:
        gan: networks and losses.
        name: "generator" or "discriminator": its ``<name>_loss`` is minimised in its weights.
        optimizer: of that network.
        clip: bound of its weights after; 0 for none.
        ema: an average of that network that moves after.
        mean: over the processes that share a batch; the update is then two graphs.

    Raises:
        CaptureError: there is no captured form of the optimiser.
    """

    def __init__(
        self,
        gan: Gan,
        name: str,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.0,
        ema: EMA | None = None,
        mean: ProcessMean | None = None,
    ) -> None:
        self.gan, self.name, self.clip, self.ema, self.mean = gan, name, clip, ema, mean
        self.network: nn.Module = getattr(gan, name)
        self.loss: Callable[[Batch, Draws], Terms] = getattr(gan, f"{name}_loss")
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = OptimizerState(optimizer, self.trained)
        self._networks = nn.ModuleDict({"generator": gan.generator, "discriminator": gan.discriminator})
        self._slots = _slots(self._networks)

    def tensors(self) -> list[Tensor]:
        """All state, in the order of the graph's first arguments, as it is now."""
        networks = [owner[key] for owner, key in self._slots.values()]
        averages = self.ema.tensors() if self.ema else []
        return [*networks, *self.optimizer.tensors(), *self.optimizer.rates, *averages]

    def trace(self, batch: Batch, draws: Draws) -> Traced:
        """One graph, or two with what processes exchange between them."""
        tensors = self.tensors()
        n, m = len(tensors), len(tensors) + len(batch)
        function = self._whole if self.mean is None else self._first

        def first(*flat: Tensor) -> list[Tensor]:
            return function(flat[:n], dict(zip(batch, flat[n:m], strict=True)), dict(zip(draws, flat[m:], strict=True)))

        arguments = [*tensors, *batch.values(), *draws.values()]
        graph = _graph_of(first, arguments)
        if self.mean is None:
            return Traced(graph, arguments, self._names)
        buckets = [torch.zeros(v.shape, dtype=v.dtype, device=v.device) for v in _example_outputs(graph)]
        exchanged = [*tensors, *buckets]
        second = _graph_of(lambda *flat: self._second(flat[:n], flat[n:]), exchanged)
        return Traced(graph, arguments, self._names, second, exchanged)

    def _whole(self, tensors: Sequence[Tensor], batch: Batch, draws: Draws) -> list[Tensor]:
        computed = self._differentiated(tensors, batch, draws)
        self._apply(tensors, computed.gradients)
        self._names = list(computed.terms)
        return list(computed.terms.values())

    def _first(self, tensors: Sequence[Tensor], batch: Batch, draws: Draws) -> list[Tensor]:
        """All but the update, packed for the other processes."""
        assert self.mean is not None
        self._computed = self._differentiated(tensors, batch, draws)
        self._names = list(self._computed.terms)
        return self.mean.pack(self._computed.tensors())

    def _second(self, tensors: Sequence[Tensor], buckets: Sequence[Tensor]) -> list[Tensor]:
        """The update by what the processes have in common."""
        assert self.mean is not None
        common = self._computed.replaced(self.mean.unpack(buckets, self._computed.tensors()))
        torch._foreach_copy_(self._buffers(tensors), common.buffers)
        self._apply(tensors, common.gradients)
        return [term.clone() for term in common.terms.values()]

    def _differentiated(self, tensors: Sequence[Tensor], batch: Batch, draws: Draws) -> Shared:
        networks, traced = self._standing_for(tensors)
        with torch.enable_grad():
            terms = _with_tensors(self._networks, networks, self.loss, batch, draws)
            gradients = gradients_of(terms, [traced[id(p)] for p in self.trained])
        self._reached = [p for p, g in zip(self.trained, gradients, strict=True) if g is not None]
        detached = {name: term.detach() for name, term in terms.items()}
        return Shared([g for g in gradients if g is not None], self._buffers(tensors), detached)

    @torch.no_grad()
    def _apply(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        networks, traced = self._standing_for(tensors)
        states, rates, averages = self._split(tensors[len(self._slots) :])
        by_id = {id(p): gradient for p, gradient in zip(self._reached, gradients, strict=True)}
        self.optimizer.update(traced, by_id, states, rates)
        _with_tensors(self._networks, networks, self._finish, averages)

    def _standing_for(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """What stands for the networks' tensors: by name, and by the identity of the tensor."""
        networks = dict(zip(self._slots, tensors, strict=False))
        return networks, {id(owner[key]): networks[name] for name, (owner, key) in self._slots.items()}

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        n = len(self.optimizer.tensors())
        m = n + len(self.optimizer.rates)
        return tensors[:n], tensors[n:m], tensors[m:]

    def _buffers(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What stands for :func:`fastgan.training.step.process_mean.floating_buffers`."""
        _, traced = self._standing_for(tensors)
        return [traced[id(buffer)] for buffer in floating_buffers(self.gan)]

    def _finish(self, averages: Sequence[Tensor]) -> None:
        if self.clip:
            clip_weights_(self.network, self.clip)
        if self.ema:
            self.ema.update(self.network, averages)


def _graph_of(function: Callable[..., Any], arguments: Sequence[Tensor]) -> GraphModule:
    # Constants that a loss closes over may stay what they are.
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)


def _example_outputs(graph: GraphModule) -> list[Tensor]:
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return [node.meta["val"] for node in output.args[0]]


def _slots(networks: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each parameter and buffer is held, by its name: reading them there is quick, and never out of date."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    for prefix, module in networks.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots[f"{prefix}.{key}"] = (held, key)
    return slots


class _Call(nn.Module):
    def __init__(self, networks: nn.Module) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def _with_tensors(networks: nn.Module, tensors: Mapping[str, Tensor], function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` while the networks hold ``tensors``."""
    named = {f"networks.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Call(networks), named, (function, *args))
