"""Compute :class:`FeatureStats` of images: of a folder, of tensors, or of a source that processes share."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.archives import open_images, read_npz
from fastgan.data.image_sources import ImageSource
from fastgan.data.stage_times import StageTimes
from fastgan.distributed import World, gather_rows
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.moments import float64_device
from fastgan.metrics.protocols import Protocol, choose_protocol
from fastgan.metrics.stats import FeatureStats
from fastgan.metrics.stats_file import write_npz

_SAVE_EVERY = 60.0  # seconds between two checkpoints
_EXTRA = "extra_"  # before the keys of the extra features' statistics in a checkpoint


def folder_stats(
    images: str | Path | ImageSource | Any,
    backbone: Backbone,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    protocol: str | Protocol | None = None,
    resize: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> FeatureStats:
    """Feature statistics of all images of a folder, archive, array file, dataset or :class:`ImageSource`; see
    :func:`fastgan.data.archives.open_images` and :mod:`fastgan.data.decode` for what is read and how.

    Args:
        protocol: a name of :mod:`fastgan.metrics.protocols`; None takes the backbone's default, as the command does.
        resize: replaces the protocol's resize method, and changes its name.

    Raises:
        InputError: no images, a file that cannot be read, or fewer than two that can.

    Example:
        >>> from torchvision.utils import save_image
        >>> for i in range(3):
        ...     save_image(torch.rand(3, 8, 8), f"{i}.png")
        >>> folder_stats(".", load_backbone(lambda images: images.float().mean((2, 3))), num_workers=0).n
        3
    """
    source = open_images(images)
    if len(source) >= backbone.compile_from:
        backbone.compile()
    chosen = choose_protocol(backbone.name, protocol, resize)
    return collect(
        source, backbone, protocol=chosen, batch_size=batch_size, num_workers=num_workers, progress=progress
    ).stats


def image_stats(
    images: Tensor | Iterable[Any],
    backbone: Backbone,
    *,
    batch_size: int = 64,
    protocol: str | Protocol | None = None,
    resize: str | None = None,
) -> FeatureStats:
    """Feature statistics of images (n, 1 or 3, h, w), uint8 in [0, 255] or floating-point in [0, 1].

    Args:
        images: one tensor, or batches of them: a DataLoader or a generator. Of a batch that is a tuple or a list, such
            as (images, labels), the first item counts.
        batch_size: images per forward pass of one tensor.
        protocol, resize: as for :func:`folder_stats`.

    Raises:
        ValueError: as :meth:`Backbone.__call__`; a batch is named by its number.

    Example:
        >>> backbone = load_backbone(lambda images: images.float().mean((2, 3)))
        >>> image_stats(torch.rand(5, 3, 8, 8), backbone).n
        5
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    chosen = choose_protocol(backbone.name, protocol, resize)
    stats = empty_stats(backbone, chosen)
    if isinstance(images, Tensor):
        for batch in images.split(batch_size):
            stats.update(backbone(batch, protocol=chosen))
        return stats
    for number, item in enumerate(images):
        batch = item[0] if isinstance(item, tuple | list) and len(item) else item
        if not isinstance(batch, Tensor):
            raise InputError(f"batch {number} must be a tensor or begin with one, got {type(batch).__name__}")
        try:
            stats.update(backbone(batch, protocol=chosen))
        except ValueError as error:
            raise InputError(f"batch {number}: {error}") from error
    return stats


def empty_stats(backbone: Backbone, protocol: Protocol) -> FeatureStats:
    """Statistics of no images yet, named after the backbone and the protocol."""
    return FeatureStats(backbone.dim, **_names(backbone, protocol))


def _names(backbone: Backbone, protocol: Protocol) -> dict[str, Any]:
    names = {"protocol": protocol.name, "resize": protocol.resize, "precision": backbone.precision}
    return {"backbone": backbone.name, **names}


@dataclass(frozen=True)
class Measured:
    """A set of images, measured by all processes together, or a file of statistics in its place.

    Attributes:
        label: names the set.
        stats: mean and covariance of the features.
        features: the features (n, dim), float32 on the CPU, in the order of the images; None if not asked for.
        extra, extra_features: the same of the backbone's extra features, if it has any.
        classes, labels: names of the classes, and the class of each row of ``features``; empty if there are none.
        times: this process's seconds per stage; None for a file.
        skipped: the names of the images that could not be read.
        left_out: counts of the files that are not of the set, in words.
        checkpoint: this process's file of the pass, which :meth:`finish` removes.
    """

    label: str
    stats: FeatureStats
    features: Tensor | None = None
    skipped: list[str] = field(default_factory=list)
    left_out: str = ""
    checkpoint: Path | None = None
    extra: FeatureStats | None = None
    extra_features: Tensor | None = None
    classes: tuple[str, ...] = ()
    labels: Tensor | None = None
    times: StageTimes | None = None

    def describe(self) -> str:
        """One line: the set, N, backbone, protocol, precision."""
        stats = self.stats
        parts = [
            "N unknown" if stats.n is None else f"N = {stats.n}",
            f"backbone {stats.backbone or 'unknown'} ({stats.dim} features)",
            f"protocol {stats.protocol or 'unknown'}",
            f"precision {stats.precision or 'unknown'}",
        ]
        parts += [f"{len(self.skipped)} unreadable left out"] if self.skipped else []
        parts += [f"left out: {self.left_out}"] if self.left_out else []
        return f"{self.label}: {', '.join(parts)}"

    def finish(self) -> None:
        """Remove the checkpoint: to be called once the result is printed and written."""
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)


def collect(
    source: ImageSource,
    backbone: Backbone,
    *,
    protocol: Protocol,
    batch_size: int = 64,
    num_workers: int | None = None,
    keep_features: bool = False,
    progress: Callable[[int], None] | None = None,
    world: World | None = None,
    checkpoint: Path | None = None,
) -> Measured:
    """Features of all images of ``source``, shared among the processes of ``world``, of which each gets the whole.

    Args:
        checkpoint: a folder in which each process saves what it has, once a minute and at the end; a later call on the
            same images goes on from there. The file stays: what is computed of the features may fail too.

    Raises:
        InputError: an image cannot be read, or fewer than two can.
    """
    world = world or World()
    source.skipped = []
    stats = empty_stats(backbone, protocol)
    extra = FeatureStats(backbone.extra, **_names(backbone, protocol)) if backbone.extra else None
    features: list[Tensor] | None = [] if keep_features else None
    times = StageTimes()
    share, done, path = world.share(len(source)), 0, None  # done counts the unreadable images too
    with world.agreed():
        if checkpoint is not None:
            path = _checkpoint_path(checkpoint, source, backbone, protocol, world, keep_features)
        if path is not None and path.exists():
            try:
                arrays = read_npz(path)
                stats = FeatureStats.from_arrays(path, arrays).to(float64_device(backbone.device))
                if extra is not None:
                    of_extra = {key.removeprefix(_EXTRA): arrays[key] for key in arrays if key.startswith(_EXTRA)}
                    extra = FeatureStats.from_arrays(path, of_extra).to(float64_device(backbone.device))
                features = [torch.from_numpy(arrays["features"])] if keep_features else None
                source.skipped, done = json.loads(str(arrays["skipped"])), int(arrays["done"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is no checkpoint of a pass, delete it to start anew: {error}") from error
            if progress is not None and done:
                progress(done)
        batches = source.batches(
            backbone.input_size,
            batch_size=batch_size,
            resize=protocol.resize,
            num_workers=num_workers,
            indices=share[done:],
            device=backbone.device,
            progress=progress,
            times=times,
        )
        last_save, read = time.monotonic(), done - len(source.skipped)
        for pixels in batches:
            with times.measure("network"):
                batch = backbone.from_pixels(pixels, protocol)
            with times.measure("statistics"):
                stats.update(batch[:, : backbone.dim])
                if extra is not None:
                    extra.update(batch[:, backbone.dim :])
                if features is not None:
                    features.append(batch.cpu())
            read += len(pixels)
            if path is not None and time.monotonic() - last_save > _SAVE_EVERY:
                # an unreadable image is met before the batch around it is full
                _save_checkpoint(path, stats, extra, features, source.skipped, read + len(source.skipped))
                last_save = time.monotonic()
        if path is not None:
            _save_checkpoint(path, stats, extra, features, source.skipped, len(share))
    if world.size > 1:
        stats.all_reduce()
        if extra is not None:
            extra.all_reduce()
    if (stats.n or 0) < 2:
        raise InputError(f"{source.label} must hold at least 2 readable images for a covariance, it holds {stats.n}")
    rows = None
    if features is not None:
        width = (stats.dim or 0) + backbone.extra
        rows = gather_rows(torch.cat(features) if features else torch.zeros(0, width), world)
    skipped = [name for names in world.gather(source.skipped) for name in names]
    return Measured(
        source.label,
        stats,
        None if rows is None else rows[:, : stats.dim],
        skipped,
        source.left_out,
        path,
        extra=extra,
        extra_features=None if rows is None or extra is None else rows[:, stats.dim :],
        times=times,
    )


def _checkpoint_path(
    folder: Path, source: ImageSource, backbone: Backbone, protocol: Protocol, world: World, keep_features: bool
) -> Path:
    """The file in ``folder`` of one pass. Other images, another backbone, protocol, precision or number of processes
    have a file of their own, and so have images that were changed since. Raises ``InputError`` if ``folder`` cannot be
    made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--checkpoint {folder} cannot be made: {error.strerror}") from error
    identity = [
        source.fingerprint(),
        [backbone.name, backbone.dim, backbone.extra, backbone.precision, protocol.name],
        [world.rank, world.size, source.skip_bad, keep_features],
    ]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "_", Path(source.label).name) or "images"
    return folder / f"{name}-{digest}.npz"


def _save_checkpoint(
    path: Path,
    stats: FeatureStats,
    extra: FeatureStats | None,
    features: list[Tensor] | None,
    skipped: list[str],
    done: int,
) -> None:
    if (stats.n or 0) < 2:  # no covariance yet
        return
    arrays = stats.to_arrays() | {"done": np.array(done), "skipped": np.array(json.dumps(skipped))}
    if extra is not None:
        arrays |= {f"{_EXTRA}{key}": value for key, value in extra.to_arrays().items()}
    if features is not None:
        arrays["features"] = torch.cat(features).numpy()
    write_npz(path, arrays)
