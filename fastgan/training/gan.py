"""The interface between a GAN and a train step: two networks, two losses, and the random numbers that they need.

The losses are pure tensor code, so that a step can be run eagerly or captured as one graph: they do not branch on a
tensor's value, read anything back to the host, or draw random numbers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.losses.adversarial import GANLoss, auxiliary_class_loss, gan_loss
from fastgan.losses.augmentation import AdaptiveAugment, augment, augment_draws, check_policy
from fastgan.losses.noise import Draw, integers, normal, uniform
from fastgan.losses.penalties import LeCam, consistency_penalty, gradient_penalty, r1_penalty
from fastgan.recipes.schema import TrainConfig

Batch = Mapping[str, Tensor]
Draws = Mapping[str, Tensor]
Terms = dict[str, Tensor]

UNREACHED = "the loss must depend on weights of the network that it is minimized in, it depends on none"


class SharedBatch(dict[str, Tensor]):
    """A batch with the tensors that several updates share, which have been computed for it."""


class GAN(Protocol):
    """Interface that a train step needs.

    A batch is a mapping with "images" (n, channels, h, w) in [-1, 1] and "labels" (n,), and "sketches" if the data has
    them. The losses are named terms, scalars whose sum is minimized in the weights of that one network.

    A GAN may also have ``shared(batch, draws)``, which returns tensors by name. :meth:`fastgan.training.TrainStep.both`
    computes them once, and both losses find them in their batch, a :class:`SharedBatch`. And it may have ``state``, a
    module whose buffers the losses move.

    Example:
        >>> net, critic = nn.Linear(4, 2), nn.Linear(2, 1)
        >>> gan = FunctionalGAN(
        ...     net,
        ...     critic,
        ...     lambda batch, draws: critic(net(draws["z"]).detach()).mean() - critic(batch["images"]).mean(),
        ...     lambda batch, draws: -critic(net(draws["z"])).mean(),
        ...     draws=lambda n: {"z": normal(n, 4)},
        ... )
        >>> step = TrainStep(gan, *(torch.optim.Adam(m.parameters()) for m in (net, critic)))  # takes any GAN
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
        shared: ``(batch, draws)`` -> tensors by name that both losses find in their batch, such as generated images.
            :meth:`fastgan.training.TrainStep.both` computes them once for both, separate updates once for each.

    Example:
        >>> net, critic = nn.Linear(4, 2), nn.Linear(2, 1)
        >>> gan = FunctionalGAN(
        ...     net,
        ...     critic,
        ...     lambda batch, draws: critic(net(draws["z"]).detach()).mean() - critic(batch["images"]).mean(),
        ...     lambda batch, draws: -critic(net(draws["z"])).mean(),
        ...     draws=lambda n: {"z": normal(n, 4)},
        ... )
        >>> step = TrainStep(gan, *(torch.optim.Adam(m.parameters()) for m in (net, critic)))
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        discriminator_loss: Callable[[Batch, Draws], Tensor | Terms],
        generator_loss: Callable[[Batch, Draws], Tensor | Terms],
        draws: Callable[[int], Mapping[str, Draw]],
        shared: Callable[[Batch, Draws], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.generator, self.discriminator, self.shared = generator, discriminator, shared
        self._discriminator_loss, self._generator_loss, self._draws = discriminator_loss, generator_loss, draws

    def discriminator_draws(self, batch: Batch) -> dict[str, Draw]:
        return dict(self._draws(len(next(iter(batch.values())))))

    generator_draws = discriminator_draws

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Terms:
        with torch.no_grad():
            batch = with_shared(batch, draws, self.shared)
        return checked_terms("discriminator_loss", self._discriminator_loss(batch, draws))

    def generator_loss(self, batch: Batch, draws: Draws) -> Terms:
        return checked_terms("generator_loss", self._generator_loss(with_shared(batch, draws, self.shared), draws))


def with_shared(batch: Batch, draws: Draws, shared: Callable[[Batch, Draws], Mapping[str, Tensor]] | None) -> Batch:
    """Return the batch with its shared tensors; compute them if the batch does not have them yet."""
    if shared is None or isinstance(batch, SharedBatch):
        return batch
    return SharedBatch({**batch, **shared(batch, draws)})


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
    """Losses of a recipe; see :class:`fastgan.recipes.TrainConfig` for the fields.

    Example:
        >>> objective = Objective(gan_loss("hinge"), gradient_penalty=10.0)
    """

    loss: GANLoss
    gradient_penalty: float = 0.0
    r1: float = 0.0
    r2: float = 0.0
    penalty_every: int = 1
    lecam: float = 0.0
    consistency: float = 0.0
    consistency_augment: tuple[str, ...] = ("flip", "translation")
    pixel_weight: float = 0.0
    class_weight_discriminator: float = 0.0
    class_weight_generator: float = 0.0
    class_loss_on_generated: bool = False
    augment: tuple[str, ...] = ()
    augment_target: float = 0.0
    augment_images: int = 500_000

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """The objective of a configuration. Raises ``ValueError`` for an unknown loss or augmentation."""
        check_policy(config.augment)
        check_policy(config.consistency_augment)
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
        autocast: bfloat16 or float16 for the networks' forward passes; penalties stay float32.

    Attributes:
        state: buffers of the losses besides the networks': LeCam's averages, the probability of adaptive augmentation.

    Raises:
        ValueError: the objective does not fit the networks.

    Example:
        >>> recipe = override(load_recipe("sagan-quick-digits"), ["steps=1", "batch_size=4"])
        >>> networks = build_networks(recipe.model, 10, image_channels=1)
        >>> gan = RecipeGAN(*networks, Objective(gan_loss("hinge")))
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
        self.state = nn.ModuleDict()
        device = next(generator.parameters()).device
        if objective.lecam:
            self.state["lecam"] = LeCam(device=device)
        if objective.augment and objective.augment_target:
            target, images = objective.augment_target, objective.augment_images
            self.state["augment"] = AdaptiveAugment(objective.augment, target=target, images=images, device=device)
        if objective.pixel_weight and not self.from_sketches:
            raise ValueError("pixel_weight must be 0 for a generator from noise, whose images have no counterparts")
        if self.has_batch_norm and (objective.gradient_penalty or objective.r1 or objective.r2):
            raise ValueError(
                "gradient penalties need a discriminator without batch norm, in which a sample has no gradient of its "
                "own: discriminator_norm must be 'none', 'instance' or 'spectral'"
            )

    def discriminator_draws(self, batch: Batch) -> dict[str, Draw]:
        n, _, height, width = batch["images"].shape
        specs = self._input_draws(n, labels=not self._shares_labels)
        specs |= self._augment_draws(n, height, width, "augment_real", "augment_fake")
        if self.objective.consistency:
            for prefix in ("consistency_real", "consistency_fake"):
                specs |= augment_draws(self.objective.consistency_augment, n, height, width, prefix)
        if self.objective.gradient_penalty:
            specs["alpha"] = uniform(n, 1, 1, 1)
        return specs

    def generator_draws(self, batch: Batch) -> dict[str, Draw]:
        n, _, height, width = batch["images"].shape
        specs = self._input_draws(n, labels=not (self.objective.loss.is_paired and self._shares_labels))
        prefixes = ("augment_real", "augment_fake") if self.objective.loss.is_paired else ("augment_fake",)
        return specs | self._augment_draws(n, height, width, *prefixes)

    def shared(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Generated images and their labels, for both losses."""
        with self._autocast(batch["images"]):
            fake, labels = self._generate(batch, draws, shared_labels=self._shares_labels)
        return {"fake": fake, "fake_labels": labels}

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Terms:
        objective = self.objective
        with self._autocast(batch["images"]):
            with torch.no_grad():
                fake, fake_labels = self._fake(batch, draws, shared_labels=self._shares_labels)
            fake = fake.detach()
            labels = batch["labels"]
            real = self._augmented(batch["images"].to(fake.dtype), batch, draws, "augment_real")
            fake = self._augmented(fake, batch, draws, "augment_fake")
            (logits, classes), (fake_logits, fake_classes) = self._score_both(real, labels, fake, fake_labels)
            if "augment" in self.state:
                cast(AdaptiveAugment, self.state["augment"]).adjust_(logits.detach())
            terms = {"adversarial": objective.loss.discriminator(logits, fake_logits)}
            if objective.class_weight_discriminator:
                loss = _class_loss(classes, labels)
                if objective.class_loss_on_generated:
                    loss = loss + _class_loss(fake_classes, fake_labels)
                terms["class"] = objective.class_weight_discriminator * loss
            if objective.lecam:
                terms["lecam"] = objective.lecam * self.state["lecam"](logits, fake_logits)
            if objective.consistency:
                policy = objective.consistency_augment
                changed = [
                    augment(images, policy, draws, f"consistency_{name}")
                    for name, images in (("real", real), ("fake", fake))
                ]
                (other, _), (fake_other, _) = self._score_both(changed[0], labels, changed[1], fake_labels)
                penalty = consistency_penalty(logits, other) + consistency_penalty(fake_logits, fake_other)
                terms["consistency"] = objective.consistency * penalty
            if objective.gradient_penalty:
                channels = batch["images"].shape[1]
                critic = self._critic(real, labels, channels)
                penalty = gradient_penalty(critic, real[:, :channels], fake[:, :channels], draws["alpha"])
                terms["gradient_penalty"] = objective.gradient_penalty * penalty
            if objective.penalty_every == 1:
                terms |= self._zero_centered(real, fake, batch)
        return terms

    def zero_centered_penalties(self, batch: Batch, draws: Draws) -> Tensor:
        """R1 and R2 together, with their weights, for a :class:`fastgan.training.LazyTerm`."""
        with self._autocast(batch["images"]):
            real = self._augmented(batch["images"].float(), batch, draws, "augment_real")
            fake = real
            if self.objective.r2:
                with torch.no_grad():
                    fake, _ = self._fake(batch, draws, shared_labels=self._shares_labels)
                fake = self._augmented(fake.detach(), batch, draws, "augment_fake")
            return total(self._zero_centered(real, fake, batch))

    def _zero_centered(self, real: Tensor, fake: Tensor, batch: Batch) -> Terms:
        objective, terms = self.objective, {}
        channels = batch["images"].shape[1]
        critic = self._critic(real, batch["labels"], channels)
        if objective.r1:
            terms["r1"] = objective.r1 * r1_penalty(critic, real[:, :channels])
        if objective.r2:
            terms["r2"] = objective.r2 * r1_penalty(critic, fake[:, :channels])
        return terms

    def _critic(self, real: Tensor, labels: Tensor, channels: int) -> Callable[[Tensor], Tensor]:
        """Scores of images with the labels and sketches of the real ones."""
        sketches = real[:, channels:]

        def critic(images: Tensor) -> Tensor:
            seen = torch.cat([images, sketches.to(images.dtype)], 1) if self.sees_sketch else images
            return self._score(seen, labels)[0]

        return critic

    def generator_loss(self, batch: Batch, draws: Draws) -> Terms:
        with self._autocast(batch["images"]):
            # Both images of a pair have one class if the discriminator has seen them so.
            shared = self.objective.loss.is_paired and self._shares_labels
            images, labels = self._fake(batch, draws, shared_labels=shared)
            fake = self._augmented(images, batch, draws, "augment_fake")
            if self.objective.loss.is_paired:
                real = self._augmented(batch["images"].to(fake.dtype), batch, draws, "augment_real")
                (real_logits, _), (logits, classes) = self._score_both(real, batch["labels"], fake, labels)
                terms = {"adversarial": self.objective.loss.generator(real_logits, logits)}
            else:
                logits, classes = self._score(fake, labels)
                terms = {"adversarial": self.objective.loss.generator(logits)}
            if self.objective.class_weight_generator:
                terms["class"] = self.objective.class_weight_generator * _class_loss(classes, labels)
            if self.objective.pixel_weight:
                difference = (images - batch["images"].to(images.dtype)).abs().mean()
                terms["pixel"] = self.objective.pixel_weight * difference
        return terms

    @property
    def _shares_labels(self) -> bool:
        """Whether generated images have the real images' labels, so that interpolated images have one class."""
        paired = bool(self.objective.gradient_penalty) or self.objective.loss.is_paired
        return paired or self.from_sketches or not self.n_classes

    def _input_draws(self, n: int, *, labels: bool) -> dict[str, Draw]:
        if self.from_sketches:
            return {}
        specs = {"z": normal(n, int(self.generator.dim_z))}  # type: ignore[arg-type]
        if labels and self.n_classes:
            specs["labels"] = integers(n, high=self.n_classes)
        return specs

    def _augment_draws(self, n: int, height: int, width: int, *prefixes: str) -> dict[str, Draw]:
        if "augment" in self.state:
            make: Callable[..., dict[str, Draw]] = cast(AdaptiveAugment, self.state["augment"]).draws
        else:
            make = partial(augment_draws, self.objective.augment)
        return {name: spec for prefix in prefixes for name, spec in make(n, height, width, prefix).items()}

    def _fake(self, batch: Batch, draws: Draws, *, shared_labels: bool) -> tuple[Tensor, Tensor]:
        """Generated images and their labels, those of the batch if it has them."""
        if isinstance(batch, SharedBatch):
            return batch["fake"], batch["fake_labels"]
        return self._generate(batch, draws, shared_labels=shared_labels)

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
        if "augment" in self.state:
            return self.state["augment"](images, draws, prefix)
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


def gradients_of(terms: Terms, weights: Sequence[Tensor], *, scale: float | Tensor = 1.0) -> list[Tensor | None]:
    """Gradients of ``scale`` times :func:`total` in ``weights``; None for weights that the loss does not reach.

    Raises:
        ValueError: the loss reaches no weight.
    """
    loss = total(terms) if isinstance(scale, float) and scale == 1 else total(terms) * scale
    gradients: list[Tensor | None] = [*torch.autograd.grad(loss, weights, allow_unused=True)]
    if all(gradient is None for gradient in gradients):
        raise ValueError(UNREACHED)
    return gradients
