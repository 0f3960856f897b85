"""From images to :class:`FeatureStats`: of a folder, of tensors, or of whatever yields batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.archives import open_images
from fastgan.data.image_sources import ImageSource
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.collect import collect
from fastgan.metrics.stats import FeatureStats


def folder_stats(
    images: str | Path | ImageSource,
    backbone: Backbone,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    resize: str = "clean",
    progress: Callable[[int], None] | None = None,
) -> FeatureStats:
    """Feature statistics of all images of a folder, zip file, npz or :class:`ImageSource`; see
    :func:`fastgan.data.archives.open_images` and :mod:`fastgan.data.decode` for what is read and how.

    Raises:
        InputError: no images, a file that cannot be read, or fewer than two that can.
    """
    source = images if isinstance(images, ImageSource) else open_images(images)
    if len(source) >= backbone.compile_from:
        backbone.compile()
    collected = collect(
        source, backbone, resize=resize, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    return collected.stats


def image_stats(
    images: Tensor | Iterable[Any], backbone: Backbone, *, batch_size: int = 64, resize: str = "clean"
) -> FeatureStats:
    """Feature statistics of images (n, 1 or 3, h, w), uint8 in [0, 255] or floating-point in [0, 1].

    Args:
        images: one tensor, or batches of them: a DataLoader or a generator. Of a batch that is a tuple or a list, such
            as (images, labels), the first item counts.
        batch_size: images per forward pass of one tensor.

    Raises:
        ValueError: as :meth:`Backbone.__call__`; a batch is named by its number.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    stats = FeatureStats(backbone.dim, backbone=backbone.name, resize=resize, precision=backbone.precision)
    if isinstance(images, Tensor):
        for batch in images.split(batch_size):
            stats.update(backbone(batch, resize=resize))
        return stats
    for number, item in enumerate(images):
        batch = item[0] if isinstance(item, tuple | list) and len(item) else item
        if not isinstance(batch, Tensor):
            raise InputError(f"batch {number} must be a tensor or begin with one, got {type(batch).__name__}")
        try:
            stats.update(backbone(batch, resize=resize))
        except ValueError as error:
            raise InputError(f"batch {number}: {error}") from error
    return stats
