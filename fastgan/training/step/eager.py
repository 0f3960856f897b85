"""One eager update of one network of a GAN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgan.losses.noise import Draw
from fastgan.losses.penalties import clip_weights_
from fastgan.training.ema import EMA
from fastgan.training.gan import GAN, Batch, Draws, Terms, gradients_of
from fastgan.training.step.optimizers import laid_out_like
from fastgan.training.step.process_mean import ProcessMean, Shared, floating_buffers


@dataclass(frozen=True)
class Update:
    """One update of one network: a step of its optimizer, clipping, and its moving average.

    Gradients of the other network's weights are never computed.

    Args:
        gan: networks and losses.
        name: "generator" or "discriminator": its ``<name>_loss`` is minimized in its weights.
        optimizer: of that network.
        clip: bound of its weights afterwards; 0 for none.
        ema: an average of that network that moves afterwards.
        mean: over the processes that share a batch. Each gives its part; gradients, buffers and terms are then means
            over all processes.
    """

    gan: GAN
    name: str
    optimizer: torch.optim.Optimizer
    clip: float = 0.0
    ema: EMA | None = None
    mean: ProcessMean | None = None

    @property
    def network(self) -> nn.Module:
        """The network that is updated."""
        return self.gan.generator if self.name == "generator" else self.gan.discriminator

    @property
    def loss(self) -> Callable[[Batch, Draws], Terms]:
        """The loss that is minimized."""
        return self.gan.generator_loss if self.name == "generator" else self.gan.discriminator_loss

    def draws(self, batch: Batch) -> dict[str, Draw]:
        """Random numbers that the loss needs for a batch of this shape."""
        return (self.gan.generator_draws if self.name == "generator" else self.gan.discriminator_draws)(batch)

    def trained(self) -> list[nn.Parameter]:
        """Weights that are not frozen."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def __call__(self, batch: Batch, draws: Draws) -> Terms:
        """Update the network once. Returns the detached terms of its loss."""
        terms, trained = self.loss(batch, draws), self.trained()
        reached = [(p, g) for p, g in zip(trained, gradients_of(terms, trained), strict=True) if g is not None]
        parameters, gradients = [p for p, _ in reached], [g for _, g in reached]
        terms = {name: term.detach() for name, term in terms.items()}
        if self.mean is not None:
            buffers = floating_buffers(self.gan)
            common = self.mean(Shared(gradients, buffers, terms))
            gradients, terms = common.gradients, common.terms
            with torch.no_grad():
                torch._foreach_copy_(buffers, common.buffers)
        for parameter, gradient in zip(parameters, laid_out_like(parameters, gradients), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.finish()
        return terms

    def finish(self, averages: Sequence[Tensor] | None = None) -> None:
        """Clip the new weights and move the average, while a graph is traced by ``averages`` that stand for its own."""
        if self.clip:
            clip_weights_(self.network, self.clip)
        if self.ema is not None:
            self.ema.update(self.network, averages)
