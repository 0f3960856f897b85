"""A torch.optim optimiser as tensors that a graph updates: the same numbers, the same state dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgan.training.step.update_ops import adam_, rmsprop_, sgd_


class CaptureError(Exception):
    """Why a step cannot be captured."""


@dataclass(frozen=True)
class _Group:
    """Parameters of one group that are trained, and the names of their states, in the order of the op's arguments."""

    index: int  # in param_groups, whose dicts Optimizer.load_state_dict replaces
    parameters: list[Tensor]
    names: tuple[str | None, ...]
    op: Callable[..., None]
    constants: Callable[[dict[str, Any]], tuple[float | bool, ...]]  # of the op, after the learning rate


class OptimizerState:
    """What a captured update reads and writes of ``optimizer``.

    States that torch makes at the first step are made here, at zero, which is where torch has them begin. Step counts
    move to the device of their parameters, as torch's own capturable and fused variants have them.

    Args:
        optimizer: Adam, AdamW, RMSprop, or SGD without dampening.
        trained: parameters that get a gradient; others of the optimiser are left alone.

    Raises:
        CaptureError: another optimiser, or an option of it, that there is no captured form of.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trained: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        wanted = {id(p) for p in trained}
        self._groups = []
        for index, options in enumerate(optimizer.param_groups):
            parameters = [p for p in options["params"] if id(p) in wanted]
            if parameters:
                self._groups.append(_group(optimizer, index, parameters))
        if not self._groups:
            raise CaptureError("the optimiser has none of the network's parameters")
        self.rates = [_rate(group.parameters[0]) for group in self._groups]
        self._set_rates: list[float | None] = [None] * len(self.rates)
        for group in self._groups:
            for parameter in group.parameters if any(group.names) else ():
                _complete(optimizer.state[parameter], parameter, group.names)

    def tensors(self) -> list[Tensor]:
        """All states as they are now: ``Optimizer.load_state_dict`` replaces them."""
        state = self.optimizer.state
        return [state[p][name] for group in self._groups for name in group.names if name for p in group.parameters]

    def refresh(self) -> None:
        """Write learning rates that have changed to :attr:`rates`."""
        for i, group in enumerate(self._groups):
            lr = self.optimizer.param_groups[group.index]["lr"]
            lr = float(lr) if not isinstance(lr, Tensor) or not lr.is_cuda else lr
            if isinstance(lr, Tensor):
                self.rates[i].copy_(lr)
            elif lr != self._set_rates[i]:
                self.rates[i].fill_(lr)
                self._set_rates[i] = lr

    def options(self) -> tuple[Any, ...]:
        """What a graph of :meth:`update` holds as constants."""
        return tuple(
            tuple((key, value) for key, value in options.items() if key not in ("params", "lr", "initial_lr"))
            for options in self.optimizer.param_groups
        )

    def update(
        self,
        traced: dict[int, Tensor],
        gradients: dict[int, Tensor],
        states: Sequence[Tensor],
        rates: Sequence[Tensor],
    ) -> None:
        """One step, in place.

        Args:
            traced: what stands for each parameter, by the parameter's id.
            gradients: likewise; a parameter without one is left alone.
            states: what stands for :meth:`tensors`.
            rates: what stands for :attr:`rates`.
        """
        position = 0
        for group, rate in zip(self._groups, rates, strict=True):
            reached = [i for i, p in enumerate(group.parameters) if id(p) in gradients]
            lists: list[list[Tensor]] = []
            for name in group.names:
                lists.append([states[position + i] for i in reached] if name else [])
                position += len(group.parameters) if name else 0
            if reached:
                ids = [id(group.parameters[i]) for i in reached]
                constants = group.constants(self.optimizer.param_groups[group.index])
                group.op([traced[i] for i in ids], [gradients[i] for i in ids], *lists, rate, *constants)


def _group(optimizer: torch.optim.Optimizer, index: int, parameters: list[Tensor]) -> _Group:
    kind, options = type(optimizer), optimizer.param_groups[index]
    names: tuple[str | None, ...]
    if options.get("differentiable"):
        raise CaptureError("differentiable optimisers are not captured")
    if any(p.is_complex() for p in parameters):
        raise CaptureError("complex parameters are not captured")
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        maxima = "max_exp_avg_sq" if options["amsgrad"] else None
        decoupled = kind is torch.optim.AdamW or bool(options.get("decoupled_weight_decay"))
        names = ("exp_avg", "exp_avg_sq", maxima, "step")
        return _Group(index, parameters, names, adam_, partial(_adam_constants, decoupled=decoupled))
    if kind is torch.optim.RMSprop:
        averages = "grad_avg" if options["centered"] else None
        momentum = "momentum_buffer" if options["momentum"] > 0 else None
        names = ("square_avg", averages, momentum, "step")
        return _Group(index, parameters, names, rmsprop_, _rmsprop_constants)
    if kind is torch.optim.SGD:
        if options["dampening"]:
            raise CaptureError("SGD with dampening is not captured")
        momentum = "momentum_buffer" if options["momentum"] else None
        return _Group(index, parameters, (momentum,), sgd_, _sgd_constants)
    raise CaptureError(f"the optimiser must be Adam, AdamW, RMSprop or SGD, got {kind.__name__}")


def _rate(like: Tensor) -> Tensor:
    # CUDA's fused kernels read a float32 rate.
    return torch.zeros((), device=like.device, dtype=torch.float32 if like.is_cuda else torch.float64)


def _complete(state: dict[str, Any], parameter: Tensor, names: Sequence[str | None]) -> None:
    for name in names:
        if name == "step":
            step = state.get(name, 0.0)
            state[name] = torch.as_tensor(step, dtype=torch.float32, device=parameter.device)
        elif name and state.get(name) is None:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)


def _adam_constants(options: dict[str, Any], *, decoupled: bool) -> tuple[float | bool, ...]:
    numbers = (*options["betas"], options["weight_decay"], options["eps"])
    return (*map(float, numbers), bool(options["maximize"]), decoupled)


def _rmsprop_constants(options: dict[str, Any]) -> tuple[float | bool, ...]:
    numbers = (options[name] for name in ("alpha", "eps", "momentum", "weight_decay"))
    return (*map(float, numbers), bool(options["maximize"]))


def _sgd_constants(options: dict[str, Any]) -> tuple[float | bool, ...]:
    momentum, decay = float(options["momentum"]), float(options["weight_decay"])
    return momentum, decay, bool(options["nesterov"]), bool(options["maximize"])
