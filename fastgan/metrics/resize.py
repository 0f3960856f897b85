"""Bringing images to a backbone's input size. The method changes a distance, so it is part of the statistics' identity.

``clean``
    Bicubic with antialiasing, in float, without rounding to integers or clipping after it: Parmar et al., "On Aliased
    Resizing and Surprising Subtleties in GAN Evaluation", 2022. Files go through Pillow, channel by channel, as
    clean-fid does. Tensors go through ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)``, the same
    filter in another order of summation.
``legacy_pytorch``
    Bilinear between pixel centres without antialiasing: ``interpolate(mode="bilinear", align_corners=False)``, as
    pytorch-fid does.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESIZE_METHODS = ("clean", "legacy_pytorch")


def check_resize(method: str) -> None:
    """Raise ``ValueError`` unless ``method`` is one of :data:`RESIZE_METHODS`."""
    if method not in RESIZE_METHODS:
        raise ValueError(f"resize must be one of {', '.join(map(repr, RESIZE_METHODS))}, got {method!r}")


def resize_tensor(images: Tensor, size: int, method: str) -> Tensor:
    """Resize float images (n, c, h, w) to (n, c, size, size), which may overshoot their range."""
    check_resize(method)
    if images.shape[-2:] == (size, size):
        return images
    if method == "clean":
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def resize_array(image: np.ndarray, size: int, method: str) -> Tensor:
    """Resize one uint8 image (h, w, 3) to float32 (3, size, size) in [0, 255], up to the filter's overshoot."""
    check_resize(method)
    if method == "clean" and image.shape[:2] != (size, size):
        return torch.from_numpy(np.stack([_resize_channel(image[:, :, c], size) for c in range(image.shape[2])]))
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    return resize_tensor(tensor[None], size, method)[0]


def _resize_channel(channel: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    floats = Image.fromarray(channel.astype(np.float32))  # mode F, which Pillow resizes without rounding
    return np.asarray(floats.resize((size, size), resample=Image.Resampling.BICUBIC))
