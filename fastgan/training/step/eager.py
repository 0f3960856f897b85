"""One eager update of some of a GAN's networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastgan._twice_differentiable import cure_named
from fastgan.losses.noise import Draw
from fastgan.losses.penalties import clip_weights_
from fastgan.training.ema import EMA
from fastgan.training.gan import GAN, UNREACHED, Batch, Draws, SharedBatch, Terms, total
from fastgan.training.step.process_mean import ProcessMean, Shared, floating_buffers

MicroBatch = tuple[Batch, Draws]


@dataclass(frozen=True)
class LazyTerm:
    """A term of a loss that is computed at every ``every``-th update alone, times ``every``.

    Args:
        loss: ``(batch, draws)`` -> a scalar, such as an R1 penalty.
        every: the interval, 16 for R1 and 4 for path lengths in StyleGAN2. The first update has the term.
        draws: maps the number of samples in a batch to the random numbers that this term needs besides the loss's.

    Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", arXiv 1912.04958, appendix B.

    Example:
        >>> critic = nn.Linear(2, 1)
        >>> term = LazyTerm(lambda batch, draws: 10 * r1_penalty(critic, batch["images"]), every=16)
    """

    loss: Callable[[Batch, Draws], Tensor]
    every: int
    draws: Callable[[int], Mapping[str, Draw]] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")


@dataclass(frozen=True)
class Update:
    """One update: a step of one optimizer by one loss, with clipping, and a moving average.

    Gradients of weights that it does not train are never computed.

    Args:
        name: "generator", "discriminator", or any other name.
        networks: every network that the loss may use, by name.
        trained_modules: those whose weights the optimizer holds.
        loss: ``(batch, draws)`` -> named terms, scalars whose sum is minimized.
        draws: maps a batch to the random numbers that the loss needs.
        optimizer: of the trained modules.
        clip: bound of the trained weights afterwards; 0 for none.
        clip_grad_norm: largest norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``; None for none.
            The norm before clipping is returned with the terms, as "grad_norm".
        clip_grad_value: largest absolute value of a gradient's entry; None for none.
        accumulate: number of equal micro-batches that a batch is split into; their gradients are averaged.
        scaler: scales the loss, and skips a step with infinite gradients.
        ema: an average of the first trained module that moves afterwards.
        mean: over the processes that share a batch. Each gives its part; gradients, buffers and terms are then means
            over all processes.
        lazy: terms that only some updates have, by name.
        owner: the object that the loss belongs to, whose attributes a captured graph may hold.
    """

    name: str
    networks: Mapping[str, nn.Module]
    trained_modules: Sequence[nn.Module]
    loss: Callable[[Batch, Draws], Terms]
    draws: Callable[[Batch], Mapping[str, Draw]]
    optimizer: torch.optim.Optimizer
    clip: float = 0.0
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    accumulate: int = 1
    scaler: GradScaler | None = None
    ema: EMA | None = None
    mean: ProcessMean | None = None
    lazy: Mapping[str, LazyTerm] = field(default_factory=dict)
    owner: Any = None

    @classmethod
    def of_gan(cls, gan: GAN, name: str, optimizer: torch.optim.Optimizer, **options: Any) -> Update:
        """The update of ``gan``'s generator or discriminator."""
        networks = {"generator": gan.generator, "discriminator": gan.discriminator}
        trained = [networks[name]]
        state = getattr(gan, "state", None)
        if isinstance(state, nn.Module):
            networks["state"] = state

        def loss(batch: Batch, draws: Draws) -> Terms:
            return getattr(gan, f"{name}_loss")(batch, draws)

        def needed(batch: Batch) -> Mapping[str, Draw]:
            return getattr(gan, f"{name}_draws")(batch)

        return cls(name, networks, trained, loss, needed, optimizer, owner=gan, **options)

    def at(self, count: int) -> tuple[str, ...]:
        """Names of the lazy terms of update number ``count``, from 0 on."""
        return tuple(name for name, term in self.lazy.items() if count % term.every == 0)

    def with_lazy(self, names: Sequence[str]) -> Update:
        """The same update whose loss has these lazy terms, and no others later."""
        main, needed, chosen = self.loss, self.draws, {name: self.lazy[name] for name in names}

        def loss(batch: Batch, draws: Draws) -> Terms:
            terms = main(batch, draws)
            return terms | {name: term.every * term.loss(batch, draws) for name, term in chosen.items()}

        def draws(batch: Batch) -> Mapping[str, Draw]:
            n, more = len(next(iter(batch.values()))), [term.draws for term in chosen.values() if term.draws]
            return {name: spec for specs in (needed(batch), *(d(n) for d in more)) for name, spec in specs.items()}

        owner = {"owner": self.owner} | {name: (term.loss, term.draws) for name, term in chosen.items()}
        return replace(self, loss=loss, draws=draws, lazy={}, owner=owner) if chosen else replace(self, lazy={})

    @property
    def parts(self) -> tuple[Update, ...]:
        """The updates that this one consists of, itself alone."""
        return (self,)

    def constants(self) -> dict[str, Any]:
        """Whatever the loss can read, by name."""
        return {**self.networks, "loss": self.loss, "draws": self.draws, "gan": self.owner}

    def state(self) -> dict[str, Any]:
        """Whatever an update can change, by name."""
        return {**self.constants(), "optimizer": self.optimizer, "ema": self.ema, "scaler": self.scaler}

    def trained(self) -> list[nn.Parameter]:
        """Weights that are not frozen, each once."""
        found = {id(p): p for module in self.trained_modules for p in module.parameters() if p.requires_grad}
        return list(found.values())

    def micro_batches(self, batch: Batch, draws: Draws) -> list[MicroBatch]:
        """Split a batch and its random numbers into equal parts."""
        return micro_batches(batch, draws, self.draws(batch), self.accumulate)

    def __call__(self, batch: Batch, draws: Draws) -> Terms:
        """Update the weights once. Returns the detached terms of the loss."""
        return self.run(self.micro_batches(batch, draws))

    def run(self, parts: Sequence[MicroBatch]) -> Terms:
        """Update the weights once by the mean over the micro-batches."""
        trained, kept = self.trained(), []
        for batch, draws in parts:
            terms = self.loss(batch, draws)
            loss = total(terms)
            if len(parts) > 1:
                loss = loss * (1 / len(parts))
            if not loss.requires_grad:
                raise ValueError(UNREACHED)
            loss = loss if self.scaler is None else self.scaler.scale(loss)
            with cure_named():
                loss.backward(inputs=trained)
            kept.append({name: term.detach() for name, term in terms.items()})
        terms = mean_terms(kept)
        reached = [p for p in trained if p.grad is not None]
        if not reached:
            raise ValueError(UNREACHED)
        if self.mean is not None:
            self.mean.agree(self.signature(terms, reached))
            buffers = floating_buffers(self.networks)
            common = self.mean(Shared([p.grad for p in reached], buffers, terms))  # type: ignore[misc]
            terms = common.terms
            with torch.no_grad():
                for p, gradient in zip(reached, common.gradients, strict=True):
                    p.grad.copy_(gradient)  # type: ignore[union-attr]
                copy_all_(buffers, common.buffers)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip_grad_value is not None:
            nn.utils.clip_grad_value_(reached, self.clip_grad_value)
        if self.clip_grad_norm is not None:
            terms["grad_norm"] = nn.utils.clip_grad_norm_(reached, self.clip_grad_norm).detach()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.finish()
        return terms

    def signature(self, terms: Iterable[str], reached: Sequence[Tensor]) -> dict[str, Any]:
        """Return the properties on which processes that exchange gradients must agree."""
        ids = {id(p) for p in reached}
        named = [(f"{name}.{key}", p) for name, m in self.networks.items() for key, p in m.named_parameters()]
        weights = [name for name, p in named if id(p) in ids]
        return {"the terms of the loss": sorted(terms), "the weights that the loss reaches": weights}

    def finish(self, averages: Sequence[Tensor] | None = None) -> None:
        """Clip the new weights and move the average; while a graph is traced, ``averages`` stand for its own."""
        if self.clip:
            for module in self.trained_modules:
                clip_weights_(module, self.clip)
        if self.ema is not None:
            self.ema.update(self.trained_modules[0], averages)


@dataclass(frozen=True)
class JointUpdate:
    """Updates one after another on tensors that are computed once, such as one fake batch for both networks of a GAN.

    Each loss finds the shared tensors in its batch. Only one of the updates may train weights that they depend on.

    Args:
        parts: the updates, in their order.
        shared: ``(batch, draws)`` -> the shared tensors, by name.
    """

    parts: tuple[Update, ...]
    shared: Callable[[Batch, Draws], Mapping[str, Tensor]]

    def __post_init__(self) -> None:
        if len({part.accumulate for part in self.parts}) > 1:
            raise ValueError("accumulate must be the same for updates that share tensors")

    @property
    def name(self) -> str:
        return " and ".join(part.name for part in self.parts)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: network for part in self.parts for name, network in part.networks.items()}

    @property
    def accumulate(self) -> int:
        return self.parts[0].accumulate

    @property
    def mean(self) -> ProcessMean | None:
        return self.parts[0].mean

    def draws(self, batch: Batch) -> dict[str, Draw]:
        """Random numbers that the shared tensors and all losses need."""
        return {name: spec for part in self.parts for name, spec in part.draws(batch).items()}

    def constants(self) -> dict[str, Any]:
        """Whatever the losses can read, by name."""
        parts = {part.name: (part.loss, part.draws, part.owner) for part in self.parts}
        return {**self.networks, "shared": self.shared, "losses": parts}

    def state(self) -> dict[str, Any]:
        """Whatever the updates can change, by name."""
        names = ("optimizer", "ema", "scaler")
        return self.constants() | {key: {part.name: getattr(part, key) for part in self.parts} for key in names}

    def trained(self) -> list[nn.Parameter]:
        """Weights that are not frozen, each once."""
        return [p for part in self.parts for p in part.trained()]

    def micro_batches(self, batch: Batch, draws: Draws) -> list[MicroBatch]:
        """Split a batch and its random numbers into equal parts, and compute the shared tensors of each."""
        parts = micro_batches(batch, draws, self.draws(batch), self.accumulate)
        return [(SharedBatch({**part, **self.shared(part, noise)}), noise) for part, noise in parts]

    def __call__(self, batch: Batch, draws: Draws) -> Terms:
        """Update all weights once. Returns the detached terms of all losses, as "discriminator/loss" and so on."""
        parts = self.micro_batches(batch, draws)
        return {f"{part.name}/{name}": term for part in self.parts for name, term in part.run(parts).items()}


def micro_batches(batch: Batch, draws: Draws, specs: Mapping[str, Draw], k: int) -> list[MicroBatch]:
    """Split a batch and its random numbers into ``k`` equal parts.

    Raises:
        ValueError: random numbers have no entry per sample in the dimension that ``specs`` name.
    """
    if k == 1:
        return [(batch, draws)]
    n = len(next(iter(batch.values())))
    images = {name: value.chunk(k) for name, value in batch.items()}
    noise: dict[str, Sequence[Tensor]] = {}
    for name, value in draws.items():
        dim = specs[name].dim
        if dim is None:
            noise[name] = [value] * k
        elif value.ndim and value.shape[dim] == n:
            noise[name] = value.chunk(k, dim)
        else:
            raise ValueError(
                f"draws[{name!r}] must have the {n} samples of the batch in dimension {dim}, which accumulate "
                f"splits, got shape {tuple(value.shape)}: say with dim= which dimension it is, or dim=None"
            )
    return [({key: v[i] for key, v in images.items()}, {key: v[i] for key, v in noise.items()}) for i in range(k)]


def mean_terms(parts: Sequence[Terms]) -> Terms:
    """Mean of each term over the micro-batches."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: torch.stack([terms[name] for terms in parts]).mean() for name in parts[0]}


def copy_all_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value to its target; none is needed."""
    if targets:
        torch._foreach_copy_(list(targets), list(values))
