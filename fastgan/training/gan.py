"""A GAN as a train step sees it: two networks, two losses, and the random numbers that the losses need.

The losses are pure tensor code - no branch on a tensor's value, nothing read back to the host, no random numbers of
their own - so that a step can be run eagerly or captured as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


class Gan(Protocol):
    """What a train step needs.

    A batch is a mapping with "images" (n, channels, h, w) in [-1, 1] and "labels" (n,), and "sketches" where the data
    has them. The losses are named terms, scalars whose sum is minimised in the weights of the one network alone.
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


@dataclass(frozen=True)
class Objective:
    """The losses of a recipe; see :class:`fastgan.recipes.TrainConfig` for the fields."""

    loss: GANLoss
    gradient_penalty: float = 0.0
    r1: float = 0.0
    class_weight_discriminator: float = 0.0
    class_weight_generator: float = 0.0
    class_loss_on_generated: bool = False
    augment: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """That of a configuration. Raises ``ValueError`` for a loss or augmentation that there is none of."""
        check_policy(config.augment)
        return cls(
            gan_loss(config.loss),
            config.gradient_penalty,
            config.r1,
            config.class_weight_discriminator,
            config.class_weight_generator,
            config.class_loss_on_generated,
            config.augment,
        )


class RecipeGan:
    """The :class:`Gan` of every recipe: a generator from noise or sketches and any discriminator of this package.

    Args:
        generator: called with noise (n, dim_z), or with sketches where it has ``sketch_channels``, and labels; has
            ``n_classes``, 0 for none.
        discriminator: called with images and labels, gives logits, or logits and class logits. With an attribute
            ``sees_sketch`` that is true it gets the sketches as further channels.
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
        if self.has_batch_norm and (objective.gradient_penalty or objective.r1):
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
        specs = self._input_draws(n, labels=True)
        return specs | augment_draws(self.objective.augment, n, height, width, "augment_fake")

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Terms:
        objective = self.objective
        with self._autocast(batch["images"]):
            with torch.no_grad():
                fake, fake_labels = self._generate(batch, draws, shared_labels=self._shares_labels)
            labels = batch["labels"]
            real = self._augmented(batch["images"].to(fake.dtype), batch, draws, "augment_real")
            fake = self._augmented(fake, batch, draws, "augment_fake")
            scores, fake_scores = self._discriminate(real, labels, fake, fake_labels)
            terms = {"adversarial": objective.loss.discriminator(scores.logits, fake_scores.logits)}
            if objective.class_weight_discriminator:
                loss = _class_loss(scores, labels)
                if objective.class_loss_on_generated:
                    loss = loss + _class_loss(fake_scores, fake_labels)
                terms["class"] = objective.class_weight_discriminator * loss
            channels = batch["images"].shape[1]
            critic = self._critic_of_images(real[:, channels:], labels)
            if objective.gradient_penalty:
                penalty = gradient_penalty(critic, real[:, :channels], fake[:, :channels], draws["alpha"])
                terms["gradient_penalty"] = objective.gradient_penalty * penalty
            if objective.r1:
                terms["r1"] = objective.r1 * r1_penalty(critic, real[:, :channels])
        return terms

    def generator_loss(self, batch: Batch, draws: Draws) -> Terms:
        with self._autocast(batch["images"]):
            fake, labels = self._generate(batch, draws, shared_labels=False)
            scores = self._score(self._augmented(fake, batch, draws, "augment_fake"), labels)
            terms = {"adversarial": self.objective.loss.generator(scores.logits)}
            if self.objective.class_weight_generator:
                terms["class"] = self.objective.class_weight_generator * _class_loss(scores, labels)
        return terms

    @property
    def _shares_labels(self) -> bool:
        """Generated images have the labels of the real ones beside them, so that what lies between has one class."""
        return bool(self.objective.gradient_penalty) or self.from_sketches or not self.n_classes

    def _input_draws(self, n: int, *, labels: bool) -> dict[str, Draw]:
        if self.from_sketches:
            return {}
        specs = {"z": normal(n, int(self.generator.dim_z))}  # type: ignore[arg-type]
        if labels and self.n_classes:
            specs["labels"] = integers(n, high=self.n_classes)
        return specs

    def _generate(self, batch: Batch, draws: Draws, *, shared_labels: bool) -> tuple[Tensor, Tensor]:
        """Images, float32 at least, and their labels."""
        if self.from_sketches:
            labels = batch["labels"]
            images = self.generator(batch["sketches"], labels)
        else:
            labels = batch["labels"] if shared_labels or not self.n_classes else draws["labels"]
            images = self.generator(draws["z"], labels)
        return (images.float() if self.autocast else images), labels

    def _augmented(self, images: Tensor, batch: Batch, draws: Draws, prefix: str) -> Tensor:
        """Images as the discriminator sees them: augmented, and with the channels of the sketches where it sees them;
        a shift moves the sketch with its image."""
        policy = self.objective.augment
        if not self.sees_sketch:
            return augment(images, policy, draws, prefix)
        return augment(torch.cat([images, batch["sketches"].to(images.dtype)], 1), policy, draws, prefix)

    def _critic_of_images(self, sketches: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """The discriminator as a function of the images alone: labels and sketches are those of the real ones."""

        def critic(images: Tensor) -> Tensor:
            seen = torch.cat([images, sketches.to(images.dtype)], 1) if self.sees_sketch else images
            return self._score(seen, labels).logits

        return critic

    def _discriminate(self, real: Tensor, labels: Tensor, fake: Tensor, fake_labels: Tensor) -> tuple[Scores, Scores]:
        if self.has_batch_norm:
            return self._score(real, labels), self._score(fake, fake_labels)
        # One forward for both halves: one power iteration of the spectral norms, and a batch twice as large.
        both = self._score(torch.cat([real, fake]), torch.cat([labels, fake_labels]))
        logits = both.logits.chunk(2)
        classes = (None, None) if both.classes is None else both.classes.chunk(2)
        return Scores(logits[0], classes[0]), Scores(logits[1], classes[1])

    def _score(self, images: Tensor, labels: Tensor) -> Scores:
        output = self.discriminator(images, labels)
        return Scores(*output) if isinstance(output, tuple) else Scores(output)

    def _autocast(self, like: Tensor) -> torch.autocast:
        # Without the cache of cast weights, which is state that a captured graph must not meet.
        dtype = self.autocast or torch.bfloat16
        return torch.autocast(like.device.type, dtype, enabled=self.autocast is not None, cache_enabled=False)


@dataclass(frozen=True)
class Scores:
    """Logits (n,), and class logits (n, n_classes) of a discriminator with an auxiliary head."""

    logits: Tensor
    classes: Tensor | None = None


def _class_loss(scores: Scores, labels: Tensor) -> Tensor:
    if scores.classes is None:
        raise ValueError("class_weight needs a discriminator with an auxiliary head, which gives class logits")
    return auxiliary_class_loss(scores.classes, labels)


def total(terms: Terms) -> Tensor:
    """The sum of all terms."""
    return torch.stack([term.float() if term.dtype != torch.float64 else term for term in terms.values()]).sum()


def gradients_of(terms: Terms, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Of :func:`total` in ``weights``; None for those that the loss does not reach, which optimisers leave alone.

    Raises:
        ValueError: it reaches none of them.
    """
    gradients: list[Tensor | None] = [*torch.autograd.grad(total(terms), weights, allow_unused=True)]
    if all(gradient is None for gradient in gradients):
        raise ValueError("the loss must depend on weights of the network that it is minimised in, it does on none")
    return gradients
