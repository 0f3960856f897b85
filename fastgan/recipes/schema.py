"""Contents of a recipe: frozen dataclasses, one per section of its YAML file, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OPTIMIZERS = ("adam", "adamw", "rmsprop", "sgd")
PRECISIONS = ("fp32", "bf16", "fp16")
STEP_MODES = ("auto", "eager", "compile", "cudagraph")
SKETCHES = ("none", "edges", "paired", "unpaired", "auto")
FITS = ("crop", "pad", "stretch")
BACKBONES = ("auto", "inception", "efficientnet_lite0")


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Args:
        source: "digits", "photos", "cifar10", "torchvision:NAME", "huggingface:NAME", or a folder, archive or array:
            images alone, one subfolder per class, or ``images`` and ``sketches``.
        channels: 1 for gray, 3 for RGB, 0 for those of the data (folders: 3).
        sketches: "none"; "edges", derived from the images; "paired" or "unpaired", from the folder; or "auto", the
            folder's if it has any, paired if each image has one of its name, else "edges".
        flip: mirror half of the images. "auto": if most are in color; digits and letters are not symmetric.
        dequantize: add noise of one gray level.
        held_out: share of a folder's images that is scored against and not trained on.
        skip_bad: leave out images that cannot be read, and count them.
        fit: way in which images become square: "crop" to the center, "pad" with the background, or "stretch".
        background: RGB color from 0 to 255 that transparent images are composited on.
        value_range: values of 16-bit or floating-point gray images that become black and white; empty for 0 and 65535.
        on_device: keep all images on the device; otherwise they stay in host memory and batches are moved.

    Example:
        >>> DataConfig(source="photos").channels
        0
    """

    source: str = "digits"
    channels: int = 0
    sketches: str = "none"
    flip: bool | None = False
    dequantize: bool = False
    held_out: float = 0.1
    skip_bad: bool = False
    fit: str = "crop"
    background: tuple[int, ...] = (255, 255, 255)
    value_range: tuple[float, ...] = ()
    on_device: bool = True

    def __post_init__(self) -> None:
        _check_choice(self, "sketches", SKETCHES)
        _check(self, lambda x: x in (0, 1, 3), "0, 1 or 3", "channels")
        _check(self, lambda x: 0 < x < 1, "in (0, 1)", "held_out")
        _check_choice(self, "fit", FITS)
        allowed = "three numbers from 0 to 255"
        _check(self, lambda x: len(x) == 3 and all(0 <= v <= 255 for v in x), allowed, "background")
        _check(self, lambda x: not x or (len(x) == 2 and x[0] < x[1]), "two increasing numbers", "value_range")


@dataclass(frozen=True)
class ModelConfig:
    """The networks; fields that an architecture does not use must keep their defaults.

    Args:
        architecture: "resnet", "dcgan", "sketch", or "vit": a residual generator and a vision transformer that
            discriminates.
        conditional: the networks see the classes.
        resolution: height and width of the images, 4, 5, 6 or 7 times a power of two; "auto": the power of two that the
            images fill, 32 to 128.
        dim_z: length of the noise.
        generator_width, discriminator_width: channels where the maps are largest.
        max_multiplier: no layer has more channels than the width times this.
        attention_resolution: width of the maps that self-attention works on; 0 for no attention. Not of the vision
            transformer, whose tokens are 8 x 8 patches.
        attention: of residual networks "sagan", "product", "cosine" (with learned sinks) or "distance"; of "vit" one of
            the last three, for both networks.
        depth: blocks of the vision transformer.
        num_heads: heads of each of them.
        generator_spectral_norm: normalize the generator's weights.
        discriminator_norm: "none", "batch", "instance" or "spectral".
        discriminator_dropout: probability of dropout in the discriminator "dcgan", in [0, 1); 0 for none.
        head: of the discriminator: "plain", "projection", "auxiliary" or "one-hot".
        label_channels: length of the sketch generator's label embedding.
        sees_sketch: the sketch discriminator sees the sketch beside the image. "auto": if sketches belong to images.

    Example:
        >>> ModelConfig(resolution=64).architecture
        'resnet'
    """

    architecture: str = "resnet"
    conditional: bool = True
    resolution: int | None = None
    dim_z: int = 128
    generator_width: int = 64
    discriminator_width: int = 64
    max_multiplier: int = 4
    attention_resolution: int = 0
    attention: str = "sagan"
    depth: int = 4
    num_heads: int = 4
    generator_spectral_norm: bool = False
    discriminator_norm: str = "none"
    discriminator_dropout: float = 0.0
    head: str = "plain"
    label_channels: int = 32
    sees_sketch: bool | None = False

    def __post_init__(self) -> None:
        _check(self, lambda x: x is None or x >= 1, "at least 1 or auto", "resolution")
        widths = ("generator_width", "discriminator_width")
        _check(self, lambda x: x > 0 and x % 8 == 0, "a positive multiple of 8", *widths)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        steps: generator updates.
        batch_size: images per discriminator update, and latents per generator update.
        n_critic: discriminator updates per generator update.
        loss: a name in ``fastgan.losses.LOSSES``.
        gradient_penalty: weight of the penalty on the critic's gradient between real and generated images; 0 for none.
        r1: weight of the R1 penalty, the paper's gamma; 0 for none.
        r2: weight of the same penalty on generated images; 0 for none.
        penalty_every: interval of R1 and R2 in discriminator updates; each is then multiplied by it.
        lecam: weight of LeCam regularization, for few images; 0 for none.
        consistency: weight of balanced consistency, on real and on generated images; 0 for none.
        consistency_augment: augmentations under which it keeps the logits.
        shared_fake: both updates use the same generated images, made once per step; needs ``n_critic`` 1.
        clip_grad_norm: largest norm of all gradients of an update together; 0 for no bound.
        clip_grad_value: largest absolute value of a gradient's entry; 0 for no bound.
        accumulate: micro-batches per update, whose gradients are averaged; must divide ``batch_size``.
        clip: bound of the critic's weights after each update; 0 for none.
        pixel_weight: weight of the mean absolute difference between generated images and those that their sketches
            belong to, in the generator (Isola et al. 2017, pix2pix: 100); 0 for none.
        class_weight_discriminator, class_weight_generator: weights of the auxiliary classifier's loss.
        class_loss_on_generated: the discriminator learns the classes of generated images too, as in the ACGAN paper.
        optimizer: "adam", "adamw", "rmsprop" or "sgd", with torch.optim's numerics.
        lr_generator, lr_discriminator: learning rates (two time scales: Heusel et al. 2017).
        betas: of adam and adamw.
        momentum: of rmsprop and sgd.
        weight_decay: of all.
        decay_from: share of ``steps`` after which both learning rates fall linearly to zero; 1 keeps them constant.
        ema_decay: decay of the generator's moving average per step, in [0, 1).
        augment: differentiable augmentations of real and generated images (Zhao et al. 2020), names in
            ``fastgan.losses.augmentation.AUGMENTATIONS``.
        augment_target: augment with a probability that grows while the mean sign of real images' logits is above this
            (Karras et al. 2020: 0.6); 0 to augment all images.
        augment_images: number of real images over which that probability may go from 0 to 1.
        precision: "fp32", or "bf16" or "fp16" for autocast; weights and gradient penalty stay float32. "fp16" scales
            the losses by a ``torch.amp.GradScaler``.
        channels_last: memory layout of weights and images.
        step_mode: how updates run: "eager"; "compile", each captured as one graph; "cudagraph", that and replayed; or
            "auto", compiled on a GPU. On a CPU a run that takes more than half an hour is timed both ways, once per
            machine, and others are eager.
        seed: of weights, noise, labels, augmentation and batch order.
        init: folder of a run or of a saved generator whose weights a new run begins with; empty for none.

    Example:
        >>> TrainConfig(loss="wasserstein", gradient_penalty=10.0).batch_size
        64
    """

    steps: int = 100_000
    batch_size: int = 64
    n_critic: int = 1
    loss: str = "hinge"
    gradient_penalty: float = 0.0
    r1: float = 0.0
    r2: float = 0.0
    penalty_every: int = 1
    lecam: float = 0.0
    consistency: float = 0.0
    consistency_augment: tuple[str, ...] = ("flip", "translation")
    shared_fake: bool = False
    clip: float = 0.0
    clip_grad_norm: float = 0.0
    clip_grad_value: float = 0.0
    accumulate: int = 1
    pixel_weight: float = 0.0
    class_weight_discriminator: float = 0.0
    class_weight_generator: float = 0.0
    class_loss_on_generated: bool = False
    optimizer: str = "adam"
    lr_generator: float = 1e-4
    lr_discriminator: float = 4e-4
    betas: tuple[float, float] = (0.0, 0.9)
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay_from: float = 1.0
    ema_decay: float = 0.999
    augment: tuple[str, ...] = ()
    augment_target: float = 0.0
    augment_images: int = 500_000
    precision: str = "fp32"
    channels_last: bool = True
    step_mode: str = "auto"
    seed: int = 0
    init: str = ""

    def __post_init__(self) -> None:
        weights = (
            "gradient_penalty",
            "r1",
            "r2",
            "clip",
            "clip_grad_norm",
            "clip_grad_value",
            "lecam",
            "consistency",
            "pixel_weight",
            "class_weight_discriminator",
            "class_weight_generator",
            "weight_decay",
        )
        _check(self, lambda x: x >= 1, "at least 1", "steps", "batch_size", "n_critic", "accumulate", "penalty_every")
        _check(self, lambda x: x >= 1, "at least 1", "augment_images")
        _check(self, lambda x: -1 < x < 1, "in (-1, 1)", "augment_target")
        if self.augment_target and not self.augment:
            raise ValueError("augment_target needs augmentations in augment, which is empty")
        if self.shared_fake and self.n_critic != 1:
            raise ValueError(f"shared_fake needs n_critic 1, got {self.n_critic}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size, {self.batch_size}, got {self.accumulate}")
        _check(self, lambda x: 0 < x < math.inf, "positive and finite", "lr_generator", "lr_discriminator")
        _check(self, lambda x: 0 <= x < math.inf, "at least 0 and finite", *weights)
        _check(self, lambda x: 0 <= x < 2**63, "from 0 to 2**63 - 1", "seed")
        _check_choice(self, "optimizer", OPTIMIZERS)
        _check_choice(self, "precision", PRECISIONS)
        _check_choice(self, "step_mode", STEP_MODES)
        _check(self, lambda x: len(x) == 2 and all(0 <= v < 1 for v in x), "two numbers in [0, 1)", "betas")
        _check(self, lambda x: 0 <= x < 1, "in [0, 1)", "momentum", "ema_decay")
        _check(self, lambda x: 0 <= x <= 1, "in [0, 1]", "decay_from")


@dataclass(frozen=True)
class LogConfig:
    """Reports of a run, and their intervals in steps.

    Args:
        grid_every, checkpoint_every, score_every: intervals; grids, checkpoints and scores are also made at the end.
        score_sizes: numbers of generated images at which the Frechet distance is taken, those that the held-out images
            allow; the largest decides which checkpoint is the best.
        backbone: "inception", "efficientnet_lite0", or "auto": Inception if its weights are at hand and the data is
            not the digits.
        tensorboard, wandb: write there too.

    Example:
        >>> LogConfig(score_every=100).grid_every
        1000
    """

    grid_every: int = 1000
    checkpoint_every: int = 1000
    score_every: int = 5000
    score_sizes: tuple[int, ...] = (128, 1024, 10_000)
    backbone: str = "auto"
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        _check(self, lambda x: x >= 1, "at least 1", "grid_every", "checkpoint_every", "score_every")
        _check(self, lambda x: x and min(x) >= 2, "numbers of at least 2", "score_sizes")
        _check_choice(self, "backbone", BACKBONES)


@dataclass(frozen=True)
class Recipe:
    """A named system: data, networks, training and reports.

    Example:
        >>> Recipe("mine", train=TrainConfig(steps=100)).train.steps
        100
    """

    name: str
    about: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        auxiliary = self.model.head == "auxiliary"
        if auxiliary and not self.train.class_weight_discriminator:
            raise ValueError("model.head 'auxiliary' needs a train.class_weight_discriminator, which is 0")
        for name in ("class_weight_discriminator", "class_weight_generator"):
            if getattr(self.train, name) and not auxiliary:
                raise ValueError(f"train.{name} needs model.head 'auxiliary', it is {self.model.head!r}")


def _check(config: Any, allows: Callable[[Any], bool], allowed: str, *names: str) -> None:
    for name in names:
        if not allows(value := getattr(config, name)):
            raise ValueError(f"{name} must be {allowed}, got {value}")


def _check_choice(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    if (value := getattr(config, name)) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
