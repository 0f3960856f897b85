"""Networks that a recipe describes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from fastgan._checks import InputError
from fastgan.models import (
    DCGANDiscriminator,
    DCGANGenerator,
    Generator,
    ResNetDiscriminator,
    ResNetGenerator,
    SketchDiscriminator,
    SketchGenerator,
    ViTDiscriminator,
)
from fastgan.recipes.schema import ModelConfig

_SHARED = {"architecture", "conditional", "resolution", "generator_width", "discriminator_width", "max_multiplier"}
_FROM_NOISE = _SHARED | {"dim_z", "attention_resolution", "generator_spectral_norm", "discriminator_norm", "head"}
USED = {
    "resnet": _FROM_NOISE | {"attention"},
    "dcgan": _FROM_NOISE | {"discriminator_dropout"},
    "sketch": _SHARED | {"label_channels", "sees_sketch"},
    "vit": _FROM_NOISE | {"attention", "depth", "num_heads"},
}
"""Fields of :class:`ModelConfig` that each architecture uses."""


def build_networks(model: ModelConfig, n_classes: int, image_channels: int) -> tuple[Generator, nn.Module]:
    """Build generator and discriminator for images of ``n_classes`` classes and ``image_channels`` channels.

    Settings that follow from the data must be settled: 32 pixels and a discriminator that sees no sketch otherwise.

    Raises:
        InputError: the architecture is unknown, has no use for a field, or cannot be built with a value.

    Example:
        >>> model = load_recipe("sagan-quick-digits").model
        >>> generator, discriminator = build_networks(model, n_classes=10, image_channels=1)
        >>> generator(torch.randn(2, generator.dim_z), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 32, 32])
    """
    if model.architecture not in USED:
        raise InputError(f"model.architecture must be one of {', '.join(map(repr, USED))}, got {model.architecture!r}")
    for f in fields(model):
        if f.name not in USED[model.architecture] and getattr(model, f.name) != f.default:
            raise InputError(f"model.{f.name} has no meaning for architecture {model.architecture!r}")
    try:
        return _build(model, n_classes if model.conditional else 0, image_channels)
    except ValueError as error:
        raise InputError(f"model: {error}") from error


def _build(model: ModelConfig, n_classes: int, image_channels: int) -> tuple[Generator, nn.Module]:
    shared: dict[str, Any] = {
        "resolution": model.resolution or 32,
        "image_channels": image_channels,
        "max_multiplier": model.max_multiplier,
    }
    g: dict[str, Any] = {"width": model.generator_width, **shared}
    d: dict[str, Any] = {"width": model.discriminator_width, **shared}
    if model.architecture == "sketch":
        generator = SketchGenerator(n_classes, label_channels=model.label_channels, **g)
        return generator, SketchDiscriminator(n_classes, sees_sketch=bool(model.sees_sketch), **d)
    attention = {"attention_resolution": model.attention_resolution or None}
    g |= {"dim_z": model.dim_z, "spectral_norm": model.generator_spectral_norm, **attention}
    d |= {"head": model.head, **attention}
    norm = model.discriminator_norm
    if model.architecture == "dcgan":
        return DCGANGenerator(n_classes, **g), DCGANDiscriminator(
            n_classes, norm=norm, dropout=model.discriminator_dropout, **d
        )
    resnet = ResNetGenerator(n_classes, attention=model.attention, **g)
    if norm not in ("none", "spectral"):
        raise ValueError(f"discriminator_norm must be 'none' or 'spectral', got {norm!r}")
    d |= {"attention": model.attention, "spectral_norm": norm == "spectral"}
    if model.architecture == "resnet":
        return resnet, ResNetDiscriminator(n_classes, **d)
    del d["attention_resolution"], d["max_multiplier"]
    return resnet, ViTDiscriminator(n_classes, depth=model.depth, num_heads=model.num_heads, **d)
