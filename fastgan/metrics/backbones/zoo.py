"""Networks of timm and torchvision as feature networks: DINOv2, CLIP, and any classifier without its head.

FD-DINOv2 is the distance of DINOv2 ViT-L/14's class token on 224x224 images (Stein et al., "Exposing flaws of
generative model evaluation metrics and their unfair treatment of diffusion models", 2023). Its weights are those that
``torch.hub`` has in its cache (``dinov2_vitl14_pretrain.pth``), else timm's copy of them, and their position embeddings
are resized as the authors of DINOv2 do it, where timm antialiases. Kynkaanniemi et al., "The Role of ImageNet Classes
in Frechet Inception Distance", 2023, take CLIP ViT-B/32. The libraries are optional and download weights into caches of
their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan._checks import InputError
from fastgan.metrics.backbones.base import Backbone, load_state, load_weights, sha256

ALIASES = {"dinov2": "timm:vit_large_patch14_dinov2.lvd142m", "clip": "timm:vit_base_patch32_clip_224.openai"}
DINOV2_FILE = "dinov2_vitl14_pretrain.pth"
"""Name of the published weights of ``dinov2`` in torch.hub's folder ``checkpoints``."""

_DINOV2_SIZE, _DINOV2_OFFSET = 224, 0.1


def load(name: str, *, weights: str | Path | None, device: torch.device | str, precision: str) -> Backbone:
    """The network ``name``, ``dinov2``, ``clip``, ``timm:NAME`` or ``torchvision:NAME``, its pooled features.

    ``weights`` is a state dict file of the library's keys, or of torch.hub's DINOv2, in place of the pretrained ones;
    the classifier's keys may be missing.

    Raises:
        InputError: the library is not installed or knows no such network, or the weights cannot be fetched or do not
            fit.
    """
    library, _, model = ALIASES.get(name, name).partition(":")
    build = _timm if library == "timm" else _torchvision
    cached = Path(torch.hub.get_dir()) / "checkpoints" / DINOV2_FILE
    published = weights is None and name == "dinov2" and cached.is_file()
    path = cached if published else weights
    try:
        network, size, mean, std = build(model, pretrained=path is None)
    except ImportError as error:
        raise InputError(f"backbone {name} needs {library}: run `pip install {library}`") from error
    except Exception as error:  # unknown names, and whatever a failed download raises in either library
        raise InputError(f"backbone {name} cannot be had from {library}: {error}") from error
    if path is not None:
        state = _without_head(load_weights(path), network)
        if _is_dinov2(model):
            state = _dinov2_state(state, network)
        load_state(network, state, path)
        name = name if published else f"{name}-{sha256(path)[:8]}"
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
    as_published = pretrained and _is_dinov2(model)
    network = timm.create_model(model, pretrained=pretrained and not as_published, num_classes=0, **options)
    if as_published:
        whole = timm.create_model(model, pretrained=True, num_classes=0)
        network.load_state_dict(_dinov2_state(whole.state_dict(), network))
    config = timm.data.resolve_model_data_config(network)
    size = options.get("img_size", config["input_size"][-1])  # the configuration keeps the size of the pretraining
    return network, size, config["mean"], config["std"]


def _is_dinov2(model: str) -> bool:
    """Return whether ``model`` is a DINOv2 without register tokens."""
    return "dinov2" in model and "_reg" not in model


def _dinov2_state(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The published state dict with position embeddings for the size of ``network``, and without what it lacks.

    They are resized bicubically, without antialiasing, by the factor (side + 0.1) / side of the published grid, as
    DINOv2's own code does for its first models.
    """
    state = {key: value for key, value in state.items() if key != "mask_token"}
    found, wanted = state.get("pos_embed"), network.state_dict()["pos_embed"]
    if found is not None and found.shape != wanted.shape:
        published, side = (round((rows.shape[1] - 1) ** 0.5) for rows in (found, wanted))
        grid = found[:, 1:].reshape(1, published, published, -1).permute(0, 3, 1, 2)
        factor = (side + _DINOV2_OFFSET) / published
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        state["pos_embed"] = torch.cat([found[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    return state


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
    """Map pixels in [0, 255] to zero mean and unit deviation per channel."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean = 255 * torch.tensor(mean).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(std).view(1, 3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)
