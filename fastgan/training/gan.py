"""A GAN as a train step sees it: two networks, two losses, and the random numbers that the losses need.

The losses are pure tensor code, so that a step can be run eagerly or captured as one graph: they do not branch on a
tensor's value, read anything back to the host, or draw random numbers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.losses.adversarial import GANLoss, auxiliary_class_loss, gan_loss
from fastgan.losses.augmentation import augment, augment_draws, check_policy
from fastgan.losses.noise import Draw, integers, normal, uniform
from fastgan.losses.penalties import gradient_penalty, r1_penalty
from fastgan.recipes.schema import TrainConfig

Batch = Mapping[str, Tensor]
Draws = Mapping[str, Tensor]
Terms = dict[str, Tensor]

UNREACHED = "the loss must depend on weights of the network that it is minimised in, it does on none"


class GAN(Protocol):
    """Interface that a train step needs.

    A batch is a mapping with "images" (n, channels, h, w) in [-1, 1] and "labels" (n,), and "sketches" if the data has
    them. The losses are named terms, scalars whose sum is minimized in the weights of that one network.
    """

    @property
    def generator(self) -> nn.Module:
        """The network that makes images."""
        ...

    @property
    def discriminator(self) -> nn.Module:
        """The network that scores them."""
        ...

    def discriminator_draws(self, batch: Batch) -> dict[str, Draw]:
        """Random numbers that :meth:`discriminator_loss` needs for a batch of this shape."""
        ...

    def generator_draws(self, batch: Batch) -> dict[str, Draw]:
        """Random numbers that :meth:`generator_loss` needs for a batch of this shape."""
        ...

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Terms:
        """Terms of the discriminator's loss on a batch of real images and on as many generated ones."""
        ...

    def generator_loss(self, batch: Batch, draws: Draws) -> Terms:
        """Terms of the generator's loss on as many generated images as the batch has."""
        ...


class FunctionalGAN:
    """A :class:`GAN` made of any two modules and two loss functions, for :class:`fastgan.training.TrainStep`.

    Args:
        generator, discriminator: modules; each loss is minimized in the weights of its own.
        discriminator_loss: ``(batch, draws)`` -> a scalar, or a dict of scalars whose sum is the loss. It calls the
            modules. Like everything that is captured, it does not branch on a tensor's value.
        generator_loss: likewise.
        draws: maps the number of images in a batch to the random numbers that the losses need, by name
            (:func:`fastgan.losses.noise.normal` and its kin). Each loss gets freshly drawn ones.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        discriminator_loss: Callable[[Batch, Draws], Tensor | Terms],
        generator_loss: Callable[[Batch, Draws], Tensor | Terms],
        draws: Callable[[int], Mapping[str, Draw]],
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self._discriminator_loss, self._generator_loss, self._draws = discriminator_loss, generator_loss, draws

    def discriminator_draws(self, batch: Batch) -> dict[str, Draw]:
        return dict(self._draws(len(next(iter(batch.values())))))

    generator_draws = discriminator_draws

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Terms:
        return checked_terms("discriminator_loss", self._discriminator_loss(batch, draws))

    def generator_loss(self, batch: Batch, draws: Draws) -> Terms:
        return checked_terms("generator_loss", self._generator_loss(batch, draws))


def checked_terms(name: str, loss: Tensor | Terms) -> Terms:
    """The loss as named terms. Raises ``ValueError`` unless they are scalars."""
    terms = {"loss": loss} if isinstance(loss, Tensor) else loss
    for key, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim:
            got = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise ValueError(f"{name} must return scalar tensors, got {got} for {key!r}")
    return terms


@dataclass(frozen=True)
class Objective:
    """Losses of a recipe; see :class:`fastgan.recipes.TrainConfig` for the fields."""

    loss: GANLoss
    gradient_penalty: float = 0.0
    r1: float = 0.0
    r2: float = 0.0
    class_weight_discriminator: float = 0.0
    class_weight_generator: float = 0.0
    class_loss_on_generated: bool = False
    augment: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """The objective of a configuration. Raises ``ValueError`` for an unknown loss or augmentation."""
        check_policy(config.augment)
        own = {f.name: getattr(config, f.name) for f in fields(cls)}
        return cls(**own | {"loss": gan_loss(config.loss)})


class RecipeGAN:
    """The :class:`GAN` of every recipe: a generator from noise or sketches and any discriminator of this package.

    Args:
        generator: called with noise (n, dim_z), or with sketches if it has ``sketch_channels``, and labels; has
            ``n_classes``, 0 for none.
        discriminator: called with images and labels, returns logits, or logits and class logits. If its attribute
            ``sees_sketch`` is true, it gets the sketches as further channels.
        objective: the losses.
        autocast: bfloat16 for the networks' forward passes; penalties stay float32.

    Raises:
        ValueError: the objective does not fit the networks.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        objective: Objective,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.objective = objective
        self.autocast = autocast
        self.n_classes = int(getattr(generator, "n_classes", 0))
        self.from_sketches = bool(getattr(generator, "sketch_channels", 0))
        self.sees_sketch = bool(getattr(discriminator, "sees_sketch", False))
        # Batch norm would mix the statistics of real and generated images in a joint forward.
        self.has_batch_norm = any(isinstance(module, _BatchNorm) for module in discriminator.modules())
        if self.has_batch_norm and (objective.gradient_penalty or objective.r1 or objective.r2):
            raise ValueError(
                "gradient penalties need a discriminator without batch norm, in which a sample has no gradient of its "
                "own: discriminator_norm must be 'none', 'instance' or 'spectral'"
            )

    def discriminator_draws(self, batch: Batch) -> dict[str, Draw]:
        n, _, height, width = batch["images"].shape
        specs = self._input_draws(n, labels=not self._shares_labels)
        policy = self.objective.augment
        specs |= augment_draws(policy, n, height, width, "augment_real")
        specs |= augment_draws(policy, n, height, width, "augment_fake")
        if self.objective.gradient_penalty:
            specs["alpha"] = uniform(n, 1, 1, 1)
        return specs

    def generator_draws(self, batch: Batch) -> dict[str, Draw]:
        n, _, height, width = batch["images"].shape
        specs = self._input_draws(n, labels=not (self.objective.loss.is_paired and self._shares_labels))
        if self.objective.loss.is_paired:
            specs |= augment_draws(self.objective.augment, n, height, width, "augment_real")
        return specs | augment_draws(self.objective.augment, n, height, width, "augment_fake")

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Terms:
        objective = self.objective
        with self._autocast(batch["images"]):
            with torch.no_grad():
                fake, fake_labels = self._generate(batch, draws, shared_labels=self._shares_labels)
            labels = batch["labels"]
            real = self._augmented(batch["images"].to(fake.dtype), batch, draws, "augment_real")
            fake = self._augmented(fake, batch, draws, "augment_fake")
            (logits, classes), (fake_logits, fake_classes) = self._score_both(real, labels, fake, fake_labels)
            terms = {"adversarial": objective.loss.discriminator(logits, fake_logits)}
            if objective.class_weight_discriminator:
                loss = _class_loss(classes, labels)
                if objective.class_loss_on_generated:
                    loss = loss + _class_loss(fake_classes, fake_labels)
                terms["class"] = objective.class_weight_discriminator * loss
            channels = batch["images"].shape[1]
            sketches = real[:, channels:]

            def critic(images: Tensor) -> Tensor:
                """Score images with the labels and sketches of the real ones."""
                seen = torch.cat([images, sketches.to(images.dtype)], 1) if self.sees_sketch else images
                return self._score(seen, labels)[0]

            if objective.gradient_penalty:
                penalty = gradient_penalty(critic, real[:, :channels], fake[:, :channels], draws["alpha"])
                terms["gradient_penalty"] = objective.gradient_penalty * penalty
            if objective.r1:
                terms["r1"] = objective.r1 * r1_penalty(critic, real[:, :channels])
            if objective.r2:
                terms["r2"] = objective.r2 * r1_penalty(critic, fake[:, :channels])
        return terms

    def generator_loss(self, batch: Batch, draws: Draws) -> Terms:
        with self._autocast(batch["images"]):
            # A pair is of one class, where the discriminator has seen it so.
            shared = self.objective.loss.is_paired and self._shares_labels
            fake, labels = self._generate(batch, draws, shared_labels=shared)
            fake = self._augmented(fake, batch, draws, "augment_fake")
            if self.objective.loss.is_paired:
                real = self._augmented(batch["images"].to(fake.dtype), batch, draws, "augment_real")
                (real_logits, _), (logits, classes) = self._score_both(real, batch["labels"], fake, labels)
                terms = {"adversarial": self.objective.loss.generator(real_logits, logits)}
            else:
                logits, classes = self._score(fake, labels)
                terms = {"adversarial": self.objective.loss.generator(logits)}
            if self.objective.class_weight_generator:
                terms["class"] = self.objective.class_weight_generator * _class_loss(classes, labels)
        return terms

    @property
    def _shares_labels(self) -> bool:
        """Generated images have the labels of the real ones beside them, so that what lies between has one class."""
        paired = bool(self.objective.gradient_penalty) or self.objective.loss.is_paired
        return paired or self.from_sketches or not self.n_classes

    def _input_draws(self, n: int, *, labels: bool) -> dict[str, Draw]:
        if self.from_sketches:
            return {}
        specs = {"z": normal(n, int(self.generator.dim_z))}  # type: ignore[arg-type]
        if labels and self.n_classes:
            specs["labels"] = integers(n, high=self.n_classes)
        return specs

    def _generate(self, batch: Batch, draws: Draws, *, shared_labels: bool) -> tuple[Tensor, Tensor]:
        """Images, float32 at least, and their labels."""
        own_labels = self.n_classes and not shared_labels and not self.from_sketches
        labels = draws["labels"] if own_labels else batch["labels"]
        images = self.generator(batch["sketches"] if self.from_sketches else draws["z"], labels)
        return (images.float() if self.autocast else images), labels

    def _augmented(self, images: Tensor, batch: Batch, draws: Draws, prefix: str) -> Tensor:
        """Images as the discriminator sees them: with their sketches as channels if it sees those, and augmented; a
        shift moves the sketch with its image."""
        if self.sees_sketch:
            images = torch.cat([images, batch["sketches"].to(images.dtype)], 1)
        return augment(images, self.objective.augment, draws, prefix)

    def _score(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (n,), and class logits (n, n_classes) of a discriminator with an auxiliary head."""
        output = self.discriminator(images, labels)
        return output if isinstance(output, tuple) else (output, None)

    def _score_both(
        self, real: Tensor, labels: Tensor, fake: Tensor, fake_labels: Tensor
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        if self.has_batch_norm:
            return self._score(real, labels), self._score(fake, fake_labels)
        # One forward for both halves: one power iteration of the spectral norms, and a batch twice as large.
        logits, classes = self._score(torch.cat([real, fake]), torch.cat([labels, fake_labels]))
        first, second = logits.chunk(2)
        first_classes, second_classes = (None, None) if classes is None else classes.chunk(2)
        return (first, first_classes), (second, second_classes)

    def _autocast(self, like: Tensor) -> torch.autocast:
        # Without the cache of cast weights, which is state that a captured graph must not meet.
        dtype = self.autocast or torch.bfloat16
        return torch.autocast(like.device.type, dtype, enabled=self.autocast is not None, cache_enabled=False)


def _class_loss(classes: Tensor | None, labels: Tensor) -> Tensor:
    if classes is None:
        raise ValueError("class_weight needs a discriminator with an auxiliary head, which gives class logits")
    return auxiliary_class_loss(classes, labels)


def total(terms: Terms) -> Tensor:
    """Sum of all terms."""
    return torch.stack([term.float() if term.dtype != torch.float64 else term for term in terms.values()]).sum()


def gradients_of(terms: Terms, weights: Sequence[Tensor], *, scale: float = 1.0) -> list[Tensor | None]:
    """Gradients of ``scale`` times :func:`total` in ``weights``; None for weights that the loss does not reach.

    Raises:
        ValueError: it reaches none of them.
    """
    loss = total(terms) if scale == 1 else total(terms) * scale
    gradients: list[Tensor | None] = [*torch.autograd.grad(loss, weights, allow_unused=True)]
    if all(gradient is None for gradient in gradients):
        raise ValueError(UNREACHED)
    return gradients
