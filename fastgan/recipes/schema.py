"""What a recipe says: frozen dataclasses, one a section of its YAML file, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The networks: arguments of the generator and of the discriminator beside classes and image channels."""

    architecture: str = "sagan"
    resolution: int = 32
    dim_z: int = 128
    generator_width: int = 64
    discriminator_width: int = 64
    max_multiplier: int = 4
    attention_resolution: int = 16


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        steps: generator updates.
        batch_size: images a discriminator update, and latents a generator update.
        n_critic: discriminator updates a generator update.
        loss: a name in ``fastgan.losses.LOSSES``.
        lr_generator, lr_discriminator: learning rates (two time scales: Heusel et al. 2017).
        betas: of both Adam optimisers.
        decay_from: the part of ``steps`` after which both learning rates fall linearly to zero; 1 keeps them constant.
        ema_decay: decay of the generator's moving average a step, in [0, 1).
        augment: differentiable augmentations of real and generated images (Zhao et al. 2020), names in
            ``fastgan.training.augment.AUGMENTATIONS``.
        seed: of weights, noise, labels, augmentation and batch order.
    """

    steps: int = 100_000
    batch_size: int = 64
    n_critic: int = 1
    loss: str = "hinge"
    lr_generator: float = 1e-4
    lr_discriminator: float = 4e-4
    betas: tuple[float, float] = (0.0, 0.9)
    decay_from: float = 1.0
    ema_decay: float = 0.999
    augment: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "n_critic"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr_generator", "lr_discriminator"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.decay_from <= 1:
            raise ValueError(f"decay_from must be in [0, 1], got {self.decay_from}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class Recipe:
    """A named system: data, networks, training."""

    name: str
    data: str = "digits"
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
