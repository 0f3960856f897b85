"""Resize images to a backbone's input size. The method changes a distance, so it is part of the statistics' identity.

``clean``
    Bicubic with antialiasing, in float, clipped to [0, 255] and not rounded to integers: Parmar et al., "On Aliased
    Resizing and Surprising Subtleties in GAN Evaluation", 2022. Files go through Pillow, channel by channel, as
    clean-fid does. Tensors go through ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)``, the same
    filter in another order of summation.
``legacy_pytorch``
    Bilinear between pixel centers without antialiasing: ``interpolate(mode="bilinear", align_corners=False)``, as
    pytorch-fid does.
``legacy_tensorflow``
    Bilinear between pixel corners without antialiasing, TensorFlow 1's ``resize_bilinear``, as the first FID
    implementation and torch-fidelity do: output pixel i is read at i * (size in / size out).
``bilinear_antialias``
    Bilinear with antialiasing: ``interpolate(mode="bilinear", antialias=True, align_corners=False)``, as torchmetrics
    does.

Images that have the size already are not touched.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESIZE_METHODS = ("clean", "legacy_pytorch", "legacy_tensorflow", "bilinear_antialias")


def check_resize(method: str) -> None:
    """Raise ``ValueError`` unless ``method`` is one of :data:`RESIZE_METHODS`."""
    if method not in RESIZE_METHODS:
        raise ValueError(f"resize must be one of {', '.join(map(repr, RESIZE_METHODS))}, got {method!r}")


def resize_tensor(images: Tensor, size: int, method: str) -> Tensor:
    """Resize float images (n, c, h, w) in [0, 255] to (n, c, size, size), on their device."""
    check_resize(method)
    if images.shape[-2:] == (size, size):
        return images
    if method == "clean":
        resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return resized.clamp_(0, 255)
    if method in ("legacy_pytorch", "bilinear_antialias"):
        antialias = method == "bilinear_antialias"
        return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=antialias)
    return _between_corners(_between_corners(images, size, dim=-2), size, dim=-1)


def clean_with_pillow(image: np.ndarray, size: int) -> np.ndarray:
    """The ``clean`` resizing of one image (h, w, 3) to (3, size, size), float32 unless it has the size already.

    NumPy and Pillow alone, which do not start threads of their own beside those that decode.
    """
    if image.shape[:2] == (size, size):
        return channels_first(image)
    from PIL import Image

    # mode F, which Pillow resizes without rounding
    channels = [Image.fromarray(image[:, :, c].astype(np.float32)) for c in range(image.shape[2])]
    resized = [np.asarray(c.resize((size, size), resample=Image.Resampling.BICUBIC)) for c in channels]
    return np.stack(resized).clip(0, 255)


def channels_first(image: np.ndarray) -> np.ndarray:
    """(h, w, c) to (c, h, w), contiguous."""
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _between_corners(images: Tensor, size: int, dim: int) -> Tensor:
    """Linear interpolation along ``dim`` at i * n / size, the last pixel repeated."""
    n = images.shape[dim]
    position = torch.arange(size, device=images.device, dtype=torch.float32) * (n / size)
    low = position.floor().long().clamp(max=n - 1)
    high = (low + 1).clamp(max=n - 1)
    weight = (position - low).to(images.dtype)
    weight = weight[:, None] if dim == -2 else weight
    return torch.lerp(images.index_select(dim, low), images.index_select(dim, high), weight)
