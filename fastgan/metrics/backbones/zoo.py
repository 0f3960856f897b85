"""Networks of timm and torchvision as feature networks: DINOv2, CLIP, and any classifier without its head.

Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion models",
2023, take DINOv2 ViT-L/14 on 224x224 images; Kynkaanniemi et al., "The Role of ImageNet Classes in Frechet Inception
Distance", 2023, CLIP ViT-B/32. The libraries are optional and download the weights into caches of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan._checks import InputError
from fastgan.metrics.backbones.base import Backbone, load_state, load_weights, sha256

ALIASES = {"dinov2": "timm:vit_large_patch14_dinov2.lvd142m", "clip": "timm:vit_base_patch32_clip_224.openai"}
_DINOV2_SIZE = 224


def load(name: str, *, weights: str | Path | None, device: torch.device | str, precision: str) -> Backbone:
    """The network ``name``, ``dinov2``, ``clip``, ``timm:NAME`` or ``torchvision:NAME``, its pooled features.

    ``weights`` is a state dict file of the library's keys in place of the pretrained ones; the classifier's may lack.

    Raises:
        InputError: the library is not installed or knows no such network, or the weights cannot be fetched or do not
            fit.
    """
    library, _, model = ALIASES.get(name, name).partition(":")
    build = _timm if library == "timm" else _torchvision
    try:
        network, size, mean, std = build(model, pretrained=weights is None)
    except ImportError as error:
        raise InputError(f"backbone {name} needs {library}: run `pip install {library}`") from error
    except Exception as error:  # unknown names, and whatever a failed download raises in either library
        raise InputError(f"backbone {name} cannot be had from {library}: {error}") from error
    if weights is not None:
        load_state(network, _without_head(load_weights(weights), network), weights)
        name = f"{name}-{sha256(weights)[:8]}"
    return Backbone(
        network.eval().to(memory_format=torch.channels_last),
        name=name,
        dim=_features_of(network, size),
        input_size=size,
        normalize=_Normalize(mean, std),
        device=device,
        precision=precision,
        own=True,
    )


def _timm(model: str, *, pretrained: bool) -> tuple[nn.Module, int, Any, Any]:
    import timm

    options: dict[str, Any] = {"img_size": _DINOV2_SIZE} if "dinov2" in model else {}
    network = timm.create_model(model, pretrained=pretrained, num_classes=0, **options)
    config = timm.data.resolve_model_data_config(network)
    return network, config["input_size"][-1], config["mean"], config["std"]


def _torchvision(model: str, *, pretrained: bool) -> tuple[nn.Module, int, Any, Any]:
    from torchvision import models

    weights = models.get_model_weights(model).DEFAULT
    network = models.get_model(model, weights=weights if pretrained else None)
    for head in ("fc", "classifier", "heads", "head"):
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
    preset = weights.transforms()
    return network, preset.crop_size[0], preset.mean, preset.std


def _without_head(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a whole classifier fits its network without the head."""
    heads = ("fc.", "classifier.", "heads.", "head.")
    expected = network.state_dict()
    return {key: value for key, value in state.items() if key in expected or not key.startswith(heads)}


def _features_of(network: nn.Module, size: int) -> int:
    with torch.inference_mode():
        return network(torch.zeros(1, 3, size, size)).shape[1]


class _Normalize:
    """From [0, 255] to zero mean and unit deviation of each channel."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean = 255 * torch.tensor(mean).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(std).view(1, 3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)
