"""torch.optim optimizers by name, and as tensors and ops that a captured graph updates: same numbers, same state dict.

Each op updates many tensors by a few multi-tensor kernels of torch. To a compiler it is one opaque, mutating call:
compile time does not grow with the number of weights, and the numbers match the eager update. Learning rates are
tensors of rank 0, so that a graph serves every rate; the fused CUDA kernels need them in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.library import custom_op

from fastgan.recipes.schema import TrainConfig


def make_optimizer(network: nn.Module, lr: float, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over all parameters of ``network``."""
    parameters, decay = network.parameters(), config.weight_decay
    if config.optimizer in ("adam", "adamw"):
        adam = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return adam(parameters, lr=lr, betas=config.betas, weight_decay=decay, fused=True)
    momentum = torch.optim.RMSprop if config.optimizer == "rmsprop" else torch.optim.SGD
    return momentum(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)


class CaptureError(Exception):
    """Reason why a step cannot be captured."""


class OptimizerState:
    """Tensors of ``optimizer`` that a captured update reads and writes.

    States that torch creates at the first step are created here, with the zeros that torch starts from. Step counts
    move to the device of their parameters, as in torch's own capturable and fused variants.

    Args:
        optimizer: Adam, AdamW, RMSprop, or SGD without dampening.
        trained: parameters that get a gradient; others of the optimizer are left alone.

    Raises:
        CaptureError: another optimizer, or one of its options, has no captured form.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trained: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        wanted = {id(p) for p in trained}
        members = [[p for p in options["params"] if id(p) in wanted] for options in optimizer.param_groups]
        self._groups = [_group(optimizer, index, parameters) for index, parameters in enumerate(members) if parameters]
        if not self._groups:
            raise CaptureError("the optimizer has none of the network's parameters")
        self.rates = [
            # CUDA's fused kernels read a float32 rate.
            torch.zeros((), device=p.device, dtype=torch.float32 if p.is_cuda else torch.float64)
            for p in (group.parameters[0] for group in self._groups)
        ]
        self._set_rates: list[float | None] = [None] * len(self.rates)
        self.tensors()

    def tensors(self) -> list[Tensor]:
        """All states as they are now, made if they are missing: ``load_state_dict`` and eager steps replace them."""
        found = []
        for group in self._groups:
            for name in filter(None, group.names):
                for p in group.parameters:
                    state = self.optimizer.state[p]
                    held = state.get(name)
                    if name == "step":
                        if not isinstance(held, Tensor) or held.device != p.device or held.dtype != torch.float32:
                            held = torch.as_tensor(0.0 if held is None else held, dtype=torch.float32, device=p.device)
                            state[name] = held
                    elif held is None:
                        held = torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False)
                        state[name] = held
                    found.append(held)
        return found

    def refresh(self) -> None:
        """Write learning rates that have changed to :attr:`rates`."""
        for i, group in enumerate(self._groups):
            lr = self.optimizer.param_groups[group.index]["lr"]
            if isinstance(lr, Tensor) and lr.is_cuda:
                self.rates[i].copy_(lr)
            elif float(lr) != self._set_rates[i]:
                self._set_rates[i] = float(lr)
                self.rates[i].fill_(float(lr))

    def update(
        self,
        traced: dict[int, Tensor],
        gradients: dict[int, Tensor],
        states: Sequence[Tensor],
        rates: Sequence[Tensor],
        found_inf: Tensor | None = None,
    ) -> None:
        """One step, in place.

        Args:
            traced: maps the id of each parameter to the tensor that stands for it.
            gradients: likewise; a parameter without one is left alone.
            states: stand for :meth:`tensors`.
            rates: stand for :attr:`rates`.
            found_inf: (1,), float32; if it is 1, nothing changes.
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
                options = self.optimizer.param_groups[group.index]
                values = [options[name] for name in group.numbers]
                numbers = [float(x) for v in values for x in (v if isinstance(v, (tuple, list)) else (v,))]
                flags = [bool(options[name]) for name in group.flags]
                weights = [traced[i] for i in ids]
                arguments = weights, [gradients[i] for i in ids], *lists, rate, *numbers, *flags
                if group.op is adam_:
                    adam_(*arguments, found_inf)
                elif found_inf is None:
                    group.op(*arguments)
                else:
                    moved = [*weights, *(t for tensors in lists for t in tensors)]
                    before = [t.clone() for t in moved]
                    group.op(*arguments)
                    for new, old in zip(moved, before, strict=True):
                        new.copy_(torch.where(found_inf == 0, new, old))


@dataclass(frozen=True)
class _Group:
    """Trained parameters of one group, and the states and options that their op takes, in the order it takes them."""

    index: int  # in param_groups, whose dicts Optimizer.load_state_dict replaces
    parameters: list[Tensor]
    names: tuple[str | None, ...]
    op: Callable[..., None]
    numbers: tuple[str, ...]
    flags: tuple[str, ...]


def _group(optimizer: torch.optim.Optimizer, index: int, parameters: list[Tensor]) -> _Group:
    kind, options = type(optimizer), optimizer.param_groups[index]
    if options.get("differentiable"):
        raise CaptureError("differentiable optimizers are not captured")
    if any(p.is_complex() for p in parameters):
        raise CaptureError("complex parameters are not captured")
    momentum = "momentum_buffer" if options.get("momentum", 0) else None
    names: tuple[str | None, ...]
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        flags = ("maximize", "decoupled_weight_decay")
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if options["amsgrad"] else None, "step")
        return _Group(index, parameters, names, adam_, ("betas", "weight_decay", "eps"), flags)
    if kind is torch.optim.RMSprop:
        names = ("square_avg", "grad_avg" if options["centered"] else None, momentum, "step")
        return _Group(index, parameters, names, rmsprop_, ("alpha", "eps", "momentum", "weight_decay"), ("maximize",))
    if kind is torch.optim.SGD:
        if options["dampening"]:
            raise CaptureError("SGD with dampening is not captured")
        return _Group(index, parameters, (momentum,), sgd_, ("momentum", "weight_decay"), ("nesterov", "maximize"))
    raise CaptureError(f"the optimizer must be Adam, AdamW, RMSprop or SGD, got {kind.__name__}")


@custom_op("fastgan::adam_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"))
def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    decoupled: bool,
    found_inf: Tensor | None = None,
) -> None:
    """torch's fused Adam, or AdamW if ``decoupled``; AMSGrad unless ``max_exp_avg_sqs`` is empty.

    Nothing changes if ``found_inf`` is 1.
    """
    torch._foreach_add_(list(steps), 1)
    update = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kept = [*exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs]  # a checkpoint of another layout may have brought them
    used = [part for m in (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if m for part in laid_out_like(params, m)]
    n = len(params)
    update(
        list(params),
        laid_out_like(params, grads),
        used[:n],
        used[n : 2 * n],
        used[2 * n :],
        list(steps),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=len(max_exp_avg_sqs) > 0,
        maximize=maximize,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(list(steps), [found_inf] * len(steps))
    for state, copy in zip(kept, used, strict=True):
        if copy is not state:
            state.copy_(copy)


@custom_op("fastgan::rmsprop_", mutates_args=("params", "square_avgs", "grad_avgs", "momenta", "steps"))
def rmsprop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    grad_avgs: Sequence[Tensor],
    momenta: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    alpha: float,
    eps: float,
    momentum: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Update as torch's RMSprop does; centered if ``grad_avgs`` is not empty."""
    torch._foreach_add_(list(steps), 1)
    used = _ascended_and_decayed(params, grads, weight_decay, maximize)
    squares = list(square_avgs)
    torch._foreach_mul_(squares, alpha)
    torch._foreach_addcmul_(squares, used, used, 1 - alpha)
    if grad_avgs:
        torch._foreach_lerp_(list(grad_avgs), used, 1 - alpha)
        roots = list(torch._foreach_addcmul(squares, list(grad_avgs), list(grad_avgs), -1))
        torch._foreach_sqrt_(roots)
    else:
        roots = list(torch._foreach_sqrt(squares))
    torch._foreach_add_(roots, eps)
    directions = list(torch._foreach_div(used, roots))
    if momenta:
        torch._foreach_mul_(list(momenta), momentum)
        torch._foreach_add_(list(momenta), directions)
        directions = list(momenta)
    torch._foreach_sub_(list(params), torch._foreach_mul(directions, lr))


@custom_op("fastgan::sgd_", mutates_args=("params", "momenta"))
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """torch's SGD without dampening, for which a momentum of zeros is the same as none yet."""
    directions = _ascended_and_decayed(params, grads, weight_decay, maximize)
    if momenta:
        torch._foreach_mul_(list(momenta), momentum)
        torch._foreach_add_(list(momenta), directions)
        directions = list(torch._foreach_add(directions, list(momenta), alpha=momentum) if nesterov else list(momenta))
    torch._foreach_sub_(list(params), torch._foreach_mul(directions, lr))


for _op in (adam_, rmsprop_, sgd_):
    _op.register_fake(lambda *_: None)


def unscaled(gradients: Sequence[Tensor], scale: Tensor, found_inf: Tensor) -> list[Tensor]:
    """Divide gradients by a scaler's scale, and set ``found_inf`` to 1 if one of them is not finite."""
    copies = [gradient.clone() for gradient in gradients]
    for dtype in dict.fromkeys(gradient.dtype for gradient in copies):
        same = [gradient for gradient in copies if gradient.dtype == dtype]
        torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, scale.double().reciprocal().float())
    return copies


def laid_out_like(params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy ``tensors`` whose strides differ from those of ``params``: torch's fused optimizers ignore strides."""
    return [
        t if t.stride() == p.stride() else torch.empty_like(p, dtype=t.dtype).copy_(t)
        for p, t in zip(params, tensors, strict=True)
    ]


def _ascended_and_decayed(
    params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float, maximize: bool
) -> list[Tensor]:
    used = list(torch._foreach_neg(list(grads)) if maximize else grads)
    return list(torch._foreach_add(used, list(params), alpha=weight_decay)) if weight_decay else used
