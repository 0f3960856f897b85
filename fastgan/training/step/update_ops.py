"""Updates of many tensors at once as ops that a captured graph holds whole.

Each is a few multi-tensor kernels that exist already. To a compiler it is one opaque, mutating call: compile time does
not grow with the number of weights, and the numbers are those of the eager update. Learning rates are tensors of
rank 0, so that a graph serves every rate; the fused kernels on CUDA want them in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op


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
) -> None:
    """torch's fused Adam, or AdamW where ``decoupled``; AMSGrad where ``max_exp_avg_sqs`` is not empty."""
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
    )
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
    """torch's RMSprop; centred where ``grad_avgs`` is not empty."""
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


@custom_op("fastgan::ema_", mutates_args=("averages", "copies", "updates"))
def ema_(
    averages: Sequence[Tensor],
    values: Sequence[Tensor],
    copies: Sequence[Tensor],
    originals: Sequence[Tensor],
    updates: Tensor,
    decay: float,
) -> None:
    """Move ``averages`` towards ``values``, copy the rest; see :class:`fastgan.training.EMA`."""
    weight = 1 - ((1 + updates) / (10 + updates)).clamp_max(decay)
    differences = list(torch._foreach_sub(list(values), list(averages)))
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(list(averages), differences)
    if copies:
        torch._foreach_copy_(list(copies), list(originals))
    updates += 1


for _op in (adam_, rmsprop_, sgd_, ema_):
    _op.register_fake(lambda *_: None)


def laid_out_like(params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` with the strides of ``params``, as torch's fused optimisers walk through memory and look at none."""
    return [
        t if t.stride() == p.stride() else torch.empty_like(p, dtype=t.dtype).copy_(t)
        for p, t in zip(params, tensors, strict=True)
    ]


def _ascended_and_decayed(
    params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float, maximize: bool
) -> list[Tensor]:
    used = list(torch._foreach_neg(list(grads)) if maximize else grads)
    return list(torch._foreach_add(used, list(params), alpha=weight_decay)) if weight_decay else used
