"""The networks that a recipe describes."""

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
)
from fastgan.recipes.schema import ModelConfig

_SHARED = {"architecture", "conditional", "resolution", "generator_width", "discriminator_width", "max_multiplier"}
_FROM_NOISE = _SHARED | {"dim_z", "attention_resolution", "generator_spectral_norm", "discriminator_norm", "head"}
USED = {"resnet": _FROM_NOISE, "dcgan": _FROM_NOISE, "sketch": _SHARED | {"label_channels", "sees_sketch"}}


def build_networks(model: ModelConfig, n_classes: int, image_channels: int) -> tuple[Generator, nn.Module]:
    """Generator and discriminator for images of ``n_classes`` classes and ``image_channels`` channels.

    Raises:
        InputError: an unknown architecture, a field that the architecture has no use for, or a value that it cannot be
            built with.
    """
    if model.architecture not in USED:
        raise InputError(f"model.architecture must be one of {', '.join(map(repr, USED))}, got {model.architecture!r}")
    for f in fields(model):
        if f.name not in USED[model.architecture] and getattr(model, f.name) != f.default:
            raise InputError(f"model.{f.name} has no meaning for architecture {model.architecture!r}")
    classes = n_classes if model.conditional else 0
    try:
        if model.architecture == "sketch":
            return _sketch(model, classes, image_channels)
        return _from_noise(model, classes, image_channels)
    except ValueError as error:
        raise InputError(f"model: {error}") from error


def _sketch(model: ModelConfig, n_classes: int, image_channels: int) -> tuple[Generator, nn.Module]:
    shared: dict[str, Any] = {
        "resolution": model.resolution,
        "image_channels": image_channels,
        "max_multiplier": model.max_multiplier,
    }
    generator = SketchGenerator(n_classes, width=model.generator_width, label_channels=model.label_channels, **shared)
    return generator, SketchDiscriminator(
        n_classes, width=model.discriminator_width, sees_sketch=model.sees_sketch, **shared
    )


def _from_noise(model: ModelConfig, n_classes: int, image_channels: int) -> tuple[Generator, nn.Module]:
    shared: dict[str, Any] = {
        "resolution": model.resolution,
        "image_channels": image_channels,
        "max_multiplier": model.max_multiplier,
        "attention_resolution": model.attention_resolution or None,
    }
    resnet = model.architecture == "resnet"
    generator = (ResNetGenerator if resnet else DCGANGenerator)(
        n_classes,
        dim_z=model.dim_z,
        width=model.generator_width,
        spectral_norm=model.generator_spectral_norm,
        **shared,
    )
    critic: dict[str, Any] = {"width": model.discriminator_width, "head": model.head, **shared}
    if not resnet:
        return generator, DCGANDiscriminator(n_classes, norm=model.discriminator_norm, **critic)
    if model.discriminator_norm not in ("none", "spectral"):
        raise ValueError(f"discriminator_norm must be 'none' or 'spectral', got {model.discriminator_norm!r}")
    return generator, ResNetDiscriminator(n_classes, spectral_norm=model.discriminator_norm == "spectral", **critic)
