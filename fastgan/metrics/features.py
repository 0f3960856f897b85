"""From images to :class:`FeatureStats`: of a folder, or of tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fastgan.metrics.backbones import Backbone
from fastgan.metrics.errors import InputError
from fastgan.metrics.images import ImageFolder, ImageSource
from fastgan.metrics.stats import FeatureStats


def folder_stats(
    folder: str | Path | ImageSource,
    backbone: Backbone,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    resize: str = "clean",
    progress: Callable[[int], None] | None = None,
) -> FeatureStats:
    """Feature statistics of all images under ``folder``; see :class:`ImageFolder` for what is read and how.

    Raises:
        InputError: no images, a file that cannot be read, or fewer than two that can.
    """
    images = folder if isinstance(folder, ImageSource) else ImageFolder(folder)
    stats = FeatureStats(backbone.dim, backbone=backbone.name, resize=resize)
    for pixels in images.batches(
        backbone.input_size, batch_size=batch_size, resize=resize, num_workers=num_workers, progress=progress
    ):
        stats.update(backbone.from_pixels(pixels))
    if (stats.n or 0) < 2:
        raise InputError(f"{images.label} must hold at least 2 readable images for a covariance, it holds {stats.n}")
    return stats


def image_stats(images: Tensor, backbone: Backbone, *, batch_size: int = 64, resize: str = "clean") -> FeatureStats:
    """Feature statistics of images (n, 1 or 3, h, w), uint8 in [0, 255] or floating-point in [0, 1].

    Raises:
        ValueError: as :meth:`Backbone.__call__`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    stats = FeatureStats(backbone.dim, backbone=backbone.name, resize=resize)
    for batch in images.split(batch_size):
        stats.update(backbone(batch, resize=resize))
    return stats
