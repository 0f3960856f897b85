"""Sketches derived from images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.checks import check_tensor


def edge_map(images: Tensor) -> Tensor:
    """A line drawing of each image: dark strokes (-1) on white paper (1) where the brightness changes.

    The strength of a stroke is the magnitude of the Sobel gradient of the channels' mean, over its maximum in the
    image; an image of one colour gives blank paper.

    Args:
        images: (n, channels, h, w), floating-point in [-1, 1].

    Returns:
        (n, 1, h, w) in [-1, 1].
    """
    check_tensor("images", images, ndim=4)
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    smooth, difference = images.new_tensor([1.0, 2.0, 1.0]), images.new_tensor([-1.0, 0.0, 1.0])
    across = torch.outer(smooth, difference)
    gradients = F.conv2d(grey, torch.stack([across, across.T])[:, None])
    strength = gradients.square().sum(1, keepdim=True).sqrt()
    peak = strength.amax((2, 3), keepdim=True).clamp_min(1e-3)
    return 1 - 2 * strength / peak
