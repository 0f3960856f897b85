"""One pass over a set of images: the statistics of its features, and the features themselves where they are wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.image_sources import ImageSource
from fastgan.distributed import World, gather_rows
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.checkpoint import Checkpoint
from fastgan.metrics.stats import FeatureStats

_SAVE_EVERY = 60.0  # seconds between two checkpoints


@dataclass(frozen=True)
class Collected:
    """What a pass leaves, of all processes together.

    Attributes:
        stats: mean and covariance of the features.
        features: the features (n, dim), float32 on the CPU, in the order of the images; None where not asked for.
        skipped: the names of the images that could not be read.
        checkpoint: this process's file of the pass, for who made use of the rest to remove.
    """

    stats: FeatureStats
    features: Tensor | None
    skipped: list[str]
    checkpoint: Path | None = None


def collect(
    source: ImageSource,
    backbone: Backbone,
    *,
    resize: str = "clean",
    batch_size: int = 64,
    num_workers: int | None = None,
    keep_features: bool = False,
    progress: Callable[[int], None] | None = None,
    world: World | None = None,
    checkpoint: Path | None = None,
) -> Collected:
    """Features of all images of ``source``, shared among the processes of ``world``, of which each gets the whole.

    Args:
        checkpoint: a folder in which each process saves what it has, once a minute and at the end; a later call on the
            same images goes on from there. The file stays: what is computed of the features may fail too.

    Raises:
        InputError: an image cannot be read, or fewer than two can.
    """
    world = world or World()
    source.skipped = []
    stats = FeatureStats(backbone.dim, backbone=backbone.name, resize=resize, precision=backbone.precision)
    state = _State(stats, [] if keep_features else None)
    share = world.share(len(source))
    saved = None
    with world.agreed():
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, source, backbone, resize, world, keep_features)
            state = _State(*saved.restore(state.stats, state.features, source.skipped))
        _pass(source, share, state, backbone, resize, batch_size, num_workers, progress, saved)
    if world.size > 1:
        state.stats.all_reduce()
    if (state.stats.n or 0) < 2:
        raise InputError(
            f"{source.label} must hold at least 2 readable images for a covariance, it holds {state.stats.n}"
        )
    features = None if state.features is None else gather_rows(_joined(state.features, backbone.dim), world)
    skipped = [name for names in world.gather(source.skipped) for name in names]
    return Collected(state.stats, features, skipped, None if saved is None else saved.path)


@dataclass
class _State:
    """How far a pass has come."""

    stats: FeatureStats
    features: list[Tensor] | None
    done: int = 0  # images of the share, the unreadable ones too


def _pass(
    source: ImageSource,
    share: range,
    state: _State,
    backbone: Backbone,
    resize: str,
    batch_size: int,
    num_workers: int | None,
    progress: Callable[[int], None] | None,
    saved: Checkpoint | None,
) -> None:
    if progress is not None and state.done:
        progress(state.done)
    last_save = time.monotonic()
    skipped_before, done_before = len(source.skipped), state.done
    batches = source.batches(
        backbone.input_size,
        batch_size=batch_size,
        resize=resize,
        num_workers=num_workers,
        indices=share[state.done :],
        device=backbone.device,
        progress=progress,
    )
    read = 0
    for pixels in batches:
        features = backbone.from_pixels(pixels)
        state.stats.update(features)
        if state.features is not None:
            state.features.append(features.cpu())
        read += len(pixels)
        # an unreadable image is met before the batch around it is full
        state.done = done_before + read + len(source.skipped) - skipped_before
        if saved is not None and time.monotonic() - last_save > _SAVE_EVERY:
            saved.save(state.stats, state.features, source.skipped, state.done)
            last_save = time.monotonic()
    state.done = len(share)
    if saved is not None:
        saved.save(state.stats, state.features, source.skipped, state.done)


def _joined(features: Sequence[Tensor], dim: int | None) -> Tensor:
    return torch.cat(list(features)) if features else torch.zeros(0, dim or 0)
