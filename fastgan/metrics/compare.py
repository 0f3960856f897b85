"""What ``fastgan fid`` does: two sources, each images or a file of statistics, to one distance with its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastgan
from fastgan._checks import InputError
from fastgan.data.archives import open_images
from fastgan.data.image_sources import ImageSource
from fastgan.distributed import World
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.collect import Collected, collect
from fastgan.metrics.frechet import frechet_distance
from fastgan.metrics.moments import float64_device
from fastgan.metrics.options import FeatureOptions, progress_bar
from fastgan.metrics.stats import FeatureStats, check_comparable, joint_precision
from fastgan.metrics.stats_file import holds_statistics

INCEPTION_DIM = 2048


@dataclass(frozen=True)
class Side:
    """One set of images, measured."""

    label: str
    collected: Collected

    @property
    def stats(self) -> FeatureStats:
        return self.collected.stats

    def describe(self) -> str:
        """One line: the set, N, backbone, resizing, precision."""
        stats = self.stats
        parts = [
            "N unknown" if stats.n is None else f"N = {stats.n}",
            f"backbone {stats.backbone or 'unknown'} ({stats.dim} features)",
            f"resize {stats.resize or 'unknown'}",
            f"precision {stats.precision or 'unknown'}",
        ]
        skipped = len(self.collected.skipped)
        parts += [f"{skipped} unreadable left out"] if skipped else []
        return f"{self.label}: {', '.join(parts)}"


@dataclass(frozen=True)
class Comparison:
    """A distance with all that is needed to read it.

    Attributes:
        floor: the distance of the second set to another split of the same data, where one was given: what a perfect
            generator would get.
    """

    sides: tuple[Side, Side]
    distance: float
    floor: float | None = None
    floor_side: Side | None = None

    @property
    def all_sides(self) -> tuple[Side, ...]:
        """With that of the floor, where there is one."""
        return self.sides if self.floor_side is None else (*self.sides, self.floor_side)

    @property
    def label(self) -> str:
        """``FID`` for Inception's features; with the backbone's name for any other."""
        return distance_label(self.sides[0].stats.backbone or self.sides[1].stats.backbone)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"metric": self.label, "value": self.distance, **describe_sides(self.sides), **self._floor_dict()}

    def _floor_dict(self) -> dict[str, Any]:
        if self.floor_side is None:
            return {}
        return {"floor": self.floor, "floor_path": self.floor_side.label, "floor_n": self.floor_side.stats.n}


def describe_sides(sides: Sequence[Side]) -> dict[str, Any]:
    """What a number depends on, for JSON."""
    stats = [side.stats for side in sides]
    return {
        "backbone": next((s.backbone for s in stats if s.backbone), None),
        "dim": stats[0].dim,
        "resize": next((s.resize for s in stats if s.resize), None),
        "precision": joint_precision(s.precision for s in stats),
        "paths": [side.label for side in sides],
        "n": [s.n for s in stats],
        "skipped": [side.collected.skipped for side in sides],
        "fastgan_version": fastgan.__version__,
    }


def distance_label(backbone: str | None, metric: str = "FID") -> str:
    """``"FID"`` for Inception's features, ``"FD (<backbone>)"`` for others; KID and IS likewise."""
    others = {"FID": "FD", "FID-infinity": "FD-infinity", "KID": "KD", "IS": "class score"}
    return metric if backbone == "inception" else f"{others[metric]} ({backbone or 'unknown backbone'})"


def compare(
    a: Path, b: Path, options: FeatureOptions, *, floor: Path | None = None, world: World | None = None
) -> Comparison:
    """The distance of two sources, each a folder of images, a zip file, an npz of images or one of statistics.

    All are looked at before any feature is computed.

    Raises:
        InputError: a source or an option cannot be used.
    """
    world = world or World()
    with world.agreed():
        sources = [open_source(path, options) for path in (a, b, floor) if path is not None]
    left, right, *third = measure(sources, options, world)
    distance = frechet_distance(left.stats, right.stats)
    if not third:
        return Comparison((left, right), distance)
    return Comparison((left, right), distance, frechet_distance(right.stats, third[0].stats), third[0])


def compute_and_save(
    folder: Path, output: Path, options: FeatureOptions, world: World | None = None, *, root: bool = False
) -> Side:
    """Write the statistics of the images of ``folder`` to ``output``, an .npz file; ``root`` as in ``save_stats``.

    Raises:
        InputError: a path or an option cannot be used; ``output`` is then as it was.
    """
    world = world or World()
    if output.suffix != ".npz":
        raise InputError(f"statistics are written to an .npz file, got {output}")
    if not output.parent.is_dir():
        raise InputError(f"cannot write {output}: its folder does not exist")
    with world.agreed():
        source = open_images(folder, skip_bad=options.skip_bad)
    (side,) = measure([source], options, world)
    with world.agreed():
        if world.is_first:
            side.stats.save(output, root=root)
    return side


def finish(*sides: Side) -> None:
    """Remove the checkpoints of what has come to its end: to be called once the result is printed and written."""
    for side in sides:
        if side.collected.checkpoint is not None:
            side.collected.checkpoint.unlink(missing_ok=True)


def merge_files(files: Sequence[Path]) -> FeatureStats:
    """Statistics of all the images behind ``files``. Raises ``InputError`` naming the file that cannot be joined."""
    merged = FeatureStats()
    for file in files:
        stats = FeatureStats.load(file)
        try:
            merged.merge(stats)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    return merged


@dataclass(frozen=True)
class StatsFile:
    """Statistics from a file, in the place of a set of images."""

    path: Path
    stats: FeatureStats


def open_source(path: Path, options: FeatureOptions) -> ImageSource | StatsFile:
    """What is behind ``path``; the images are not read yet."""
    if path.suffix != ".npz" or path.is_dir() or not holds_statistics(path):
        return open_images(path, skip_bad=options.skip_bad)
    stats = FeatureStats.load(path)
    if stats.backbone is None:
        stats.backbone = options.backbone or _presumed_backbone(path, stats, options)
    return StatsFile(path, stats)


def measure(
    sources: Sequence[ImageSource | StatsFile],
    options: FeatureOptions,
    world: World,
    *,
    keep_features: Sequence[bool] | None = None,
    network: Backbone | None = None,
) -> list[Side]:
    """Statistics of each source, and features where ``keep_features`` says so, all from one network.

    Raises:
        InputError: the sources or the options do not fit each other, a set has fewer than two images, or an image
            cannot be read.
    """
    for source in sources:
        if isinstance(source, ImageSource) and len(source) < 2:
            raise InputError(f"{source.label} must hold at least 2 images for a covariance, it holds {len(source)}")
    loaded = [source.stats for source in sources if isinstance(source, StatsFile)]
    if len(loaded) == len(sources):
        for stats in loaded[1:]:
            check_comparable(loaded[0], stats)
        if options.dims not in (None, loaded[0].dim):
            raise InputError(f"--dims must be {loaded[0].dim} for these statistics, got {options.dims}")
        return [_from_file(source) for source in sources if isinstance(source, StatsFile)]
    network = network or options.network(loaded, world)
    resize = options.resize_method(loaded, network)
    if sum(len(source) for source in sources if isinstance(source, ImageSource)) >= network.compile_from * world.size:
        network.compile()
    for stats in loaded:
        check_comparable(stats, FeatureStats(network.dim, backbone=network.name, resize=resize))
    keep = keep_features or [False] * len(sources)
    return [
        _from_file(source, network)
        if isinstance(source, StatsFile)
        else _pass(source, network, resize, options, world, k)
        for source, k in zip(sources, keep, strict=True)
    ]


def _from_file(source: StatsFile, network: Backbone | None = None) -> Side:
    stats = source.stats if network is None else source.stats.to(float64_device(network.device))
    return Side(str(source.path), Collected(stats, None, []))


def _pass(
    source: ImageSource, network: Backbone, resize: str, options: FeatureOptions, world: World, keep_features: bool
) -> Side:
    with progress_bar(source.label, len(world.share(len(source)))) as advance:
        collected = collect(
            source,
            network,
            resize=resize,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            keep_features=keep_features,
            progress=advance if world.is_first else None,
            world=world,
            checkpoint=options.checkpoint,
        )
    return Side(source.label, collected)


def _presumed_backbone(path: Path, stats: FeatureStats, options: FeatureOptions) -> str | None:
    """pytorch-fid's and clean-fid's files do not name their network; 2048 features are Inception's by custom."""
    if stats.dim != INCEPTION_DIM:
        return None
    options.note(f"{path} does not name its backbone; its {stats.dim} features are taken for inception's")
    return "inception"
