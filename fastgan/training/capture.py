"""One network's update as one graph over fake tensors: loss, penalties, backward, optimiser, clipping, average.

``make_fx`` runs the real autograd engine while it records ATen ops, so that a gradient penalty's double backward,
custom ops and the optimiser come out as one flat graph without autograd. All state goes in as arguments and is updated
in place. Tracing runs on fake tensors and changes no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan.regularisers import clip_weights_
from fastgan.training.ema import EMA
from fastgan.training.gan import Batch, Draws, Gan, Terms, total
from fastgan.training.optimizer_state import OptimizerState


class Update:
    """One update of the network ``name`` of ``gan`` as a function of tensors.

    Args:
        gan: networks and losses.
        name: "generator" or "discriminator": its ``<name>_loss`` is minimised in its weights.
        optimizer: of that network.
        clip: bound of its weights after; 0 for none.
        ema: an average of that network that moves after.
        reduce: takes gradients to their mean over processes.

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
        reduce: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        self.gan, self.name, self.clip, self.ema, self.reduce = gan, name, clip, ema, reduce
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

    def trace(self, batch: Batch, draws: Draws) -> tuple[GraphModule, list[str]]:
        """The graph, from :meth:`tensors`, batch and draws to the terms of the loss, and the names of these."""
        names: list[str] = []

        def function(tensors: list[Tensor], batch: Batch, draws: Draws) -> list[Tensor]:
            terms = self._run(tensors, batch, draws)
            names[:] = terms
            return list(terms.values())

        # Constants that a loss closes over may stay what they are.
        trace = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
        return trace(self.tensors(), dict(batch), dict(draws)), names

    def _run(self, tensors: Sequence[Tensor], batch: Batch, draws: Draws) -> Terms:
        n_slots, n_rates = len(self._slots), len(self.optimizer.rates)
        n_states = len(self.optimizer.tensors())
        networks = dict(zip(self._slots, tensors[:n_slots], strict=True))
        states = tensors[n_slots : n_slots + n_states]
        rates = tensors[n_slots + n_states : n_slots + n_states + n_rates]
        averages = tensors[n_slots + n_states + n_rates :]
        traced = {id(owner[key]): networks[name] for name, (owner, key) in self._slots.items()}
        with torch.enable_grad():
            terms = _with_tensors(self._networks, networks, self.loss, batch, draws)
            leaves = [traced[id(p)] for p in self.trained]
            gradients = list(torch.autograd.grad(total(terms), leaves))
        with torch.no_grad():
            if self.reduce:
                gradients = self.reduce(gradients)
            by_id = {id(p): gradient for p, gradient in zip(self.trained, gradients, strict=True)}
            self.optimizer.update(traced, by_id, states, rates)
            _with_tensors(self._networks, networks, self._finish, averages)
        return {name: term.detach() for name, term in terms.items()}

    def _finish(self, averages: Sequence[Tensor]) -> None:
        if self.clip:
            clip_weights_(self.network, self.clip)
        if self.ema:
            self.ema.update(self.network, averages)


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
