"""One update of either network, eagerly."""

from __future__ import annotations

import torch
from torch import nn

from fastgan.losses.penalties import clip_weights_
from fastgan.training.ema import EMA
from fastgan.training.gan import Batch, Draws, Gan, Terms, gradients_of
from fastgan.training.step.process_mean import ProcessMean, Shared, floating_buffers
from fastgan.training.step.update_ops import laid_out_like


def discriminator_step(
    gan: Gan,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    draws: Draws,
    *,
    clip: float = 0.0,
    mean: ProcessMean | None = None,
) -> Terms:
    """Update the discriminator once; with ``clip``, bound its weights after. Returns the detached terms of its loss.

    With ``mean``, ``batch`` is this process's part, and gradients, buffers and terms are means over all processes.
    """
    terms = _minimise(gan, gan.discriminator_loss(batch, draws), gan.discriminator, optimizer, mean)
    if clip:
        clip_weights_(gan.discriminator, clip)
    return terms


def generator_step(
    gan: Gan,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    draws: Draws,
    *,
    ema: EMA | None = None,
    mean: ProcessMean | None = None,
) -> Terms:
    """Update the generator once, and its moving average after. Returns and ``mean`` as :func:`discriminator_step`."""
    terms = _minimise(gan, gan.generator_loss(batch, draws), gan.generator, optimizer, mean)
    if ema is not None:
        ema.update(gan.generator)
    return terms


def _minimise(
    gan: Gan, terms: Terms, network: nn.Module, optimizer: torch.optim.Optimizer, mean: ProcessMean | None
) -> Terms:
    """One optimiser step on ``network`` alone: gradients of the other network's weights are never computed."""
    trained = [p for p in network.parameters() if p.requires_grad]
    reached = [(p, g) for p, g in zip(trained, gradients_of(terms, trained), strict=True) if g is not None]
    parameters, gradients = [p for p, _ in reached], [g for _, g in reached]
    terms = {name: term.detach() for name, term in terms.items()}
    if mean is not None:
        buffers = floating_buffers(gan)
        common = mean(Shared(gradients, buffers, terms))
        gradients, terms = common.gradients, common.terms
        with torch.no_grad():
            torch._foreach_copy_(buffers, common.buffers)
    for parameter, gradient in zip(parameters, laid_out_like(parameters, gradients), strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return terms
