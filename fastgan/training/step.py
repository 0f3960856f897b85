"""One update of either network, eagerly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan.regularisers import clip_weights_
from fastgan.training.ema import EMA
from fastgan.training.gan import Batch, Draws, Gan, Terms, total
from fastgan.training.update_ops import laid_out_like


def discriminator_step(
    gan: Gan, optimizer: torch.optim.Optimizer, batch: Batch, draws: Draws, *, clip: float = 0.0
) -> Terms:
    """Update the discriminator once; with ``clip``, bound its weights after. Returns the detached terms of its loss."""
    terms = gan.discriminator_loss(batch, draws)
    _minimise(total(terms), gan.discriminator, optimizer)
    if clip:
        clip_weights_(gan.discriminator, clip)
    return {name: term.detach() for name, term in terms.items()}


def generator_step(
    gan: Gan, optimizer: torch.optim.Optimizer, batch: Batch, draws: Draws, *, ema: EMA | None = None
) -> Terms:
    """Update the generator once, and its moving average after. Returns the detached terms of its loss."""
    terms = gan.generator_loss(batch, draws)
    _minimise(total(terms), gan.generator, optimizer)
    if ema is not None:
        ema.update(gan.generator)
    return {name: term.detach() for name, term in terms.items()}


def _minimise(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step on ``network`` alone: gradients of the other network's weights are never computed."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = laid_out_like(parameters, torch.autograd.grad(loss, parameters))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
