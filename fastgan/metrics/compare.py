"""What ``fastgan fid`` does: two sources, each a folder or a file of statistics, to one distance with its name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastgan
from fastgan.metrics.backbones import BACKBONES, PRECISIONS, Backbone, default_backbone, load_backbone
from fastgan.metrics.errors import InputError
from fastgan.metrics.features import folder_stats
from fastgan.metrics.frechet import frechet_distance
from fastgan.metrics.images import ImageSource
from fastgan.metrics.resize import RESIZE_METHODS
from fastgan.metrics.sources import open_images
from fastgan.metrics.stats import FeatureStats, check_comparable

INCEPTION_DIM = 2048


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class FeatureOptions:
    """How features are computed where a source is a folder; None leaves the choice to the sources and the machine."""

    backbone: str | None = None
    weights: Path | None = None
    resize: str | None = None
    precision: str = "fp32"
    device: str | None = None
    dims: int | None = None
    batch_size: int = 64
    num_workers: int | None = None
    skip_bad: bool = False
    note: Callable[[str], None] = _silent
    """Called with each line the user should know of."""

    def __post_init__(self) -> None:
        _check_choice("--backbone", self.backbone, BACKBONES)
        _check_choice("--resize", self.resize, RESIZE_METHODS)
        _check_choice("--precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class Comparison:
    """A distance with all that is needed to read it."""

    paths: tuple[Path, Path]
    stats: tuple[FeatureStats, FeatureStats]
    skipped: tuple[list[str], list[str]]
    distance: float
    precision: str | None = None
    """Of the forward passes made here; None where there was none."""

    @property
    def backbone(self) -> str | None:
        """Name of the feature network, where a side tells."""
        return self.stats[0].backbone or self.stats[1].backbone

    @property
    def label(self) -> str:
        """``FID`` for Inception's features; with the backbone's name for any other."""
        return distance_label(self.backbone)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.label,
            "value": self.distance,
            "backbone": self.backbone,
            "dim": self.stats[0].dim,
            "resize": self.stats[0].resize or self.stats[1].resize,
            "precision": self.precision,
            "paths": [str(path) for path in self.paths],
            "n": [stats.n for stats in self.stats],
            "skipped": list(self.skipped),
            "fastgan_version": fastgan.__version__,
        }


def distance_label(backbone: str | None) -> str:
    """``"FID"`` for Inception's features, ``"FD (<backbone>)"`` for others."""
    return "FID" if backbone == "inception" else f"FD ({backbone or 'unknown backbone'})"


def compare(a: Path, b: Path, options: FeatureOptions) -> Comparison:
    """The distance of two sources, each a folder of images or an .npz file of statistics.

    Both are looked at before any feature is computed.

    Raises:
        InputError: a source or an option cannot be used.
    """
    sources = (_Source.open(a, options), _Source.open(b, options))
    loaded = [source.stats for source in sources if source.stats is not None]
    network = None
    if len(loaded) < 2:
        network, resize = _network(loaded, options), _resize(loaded, options)
        for stats in loaded:
            check_comparable(stats, FeatureStats(network.dim, backbone=network.name, resize=resize))
        left, right = (source.computed(network, resize, options) for source in sources)
    else:
        left, right = loaded
        check_comparable(left, right)
        _check_dims(left.dim, options)
    return Comparison(
        paths=(a, b),
        stats=(left, right),
        skipped=(sources[0].skipped, sources[1].skipped),
        distance=frechet_distance(left, right),
        precision=None if network is None else options.precision,
    )


def compute_and_save(folder: Path, output: Path, options: FeatureOptions) -> FeatureStats:
    """Write the statistics of the images under ``folder`` to ``output``, an .npz file.

    Raises:
        InputError: a path or an option cannot be used; ``output`` is then as it was.
    """
    if output.suffix != ".npz":
        raise InputError(f"--save-stats writes an .npz file, got {output}")
    if not output.parent.is_dir():
        raise InputError(f"cannot write {output}: its folder does not exist")
    source = _Source(folder, images=open_images(folder, skip_bad=options.skip_bad))
    stats = source.computed(_network([], options), _resize([], options), options)
    stats.save(output)
    if source.skipped:
        options.note(f"{folder}: {len(source.skipped)} unreadable images left out")
    return stats


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
class _Source:
    """One side of a comparison: statistics from a file, or images whose statistics are still to be computed."""

    path: Path
    stats: FeatureStats | None = None
    images: ImageSource | None = None

    @classmethod
    def open(cls, path: Path, options: FeatureOptions) -> _Source:
        if path.is_dir() or path.suffix != ".npz":
            return cls(path, images=open_images(path, skip_bad=options.skip_bad))
        stats = FeatureStats.load(path)
        if stats.backbone is None:
            stats.backbone = options.backbone or _presumed_backbone(path, stats, options)
        return cls(path, stats=stats)

    @property
    def skipped(self) -> list[str]:
        return [] if self.images is None else self.images.skipped

    def computed(self, network: Backbone, resize: str, options: FeatureOptions) -> FeatureStats:
        if self.images is None:
            assert self.stats is not None
            return self.stats.to(network.device)
        with _progress_bar(str(self.path), len(self.images)) as advance:
            return folder_stats(
                self.images,
                network,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                resize=resize,
                progress=advance,
            )


def _presumed_backbone(path: Path, stats: FeatureStats, options: FeatureOptions) -> str | None:
    """pytorch-fid's and clean-fid's files do not name their network; 2048 features are Inception's by custom."""
    if stats.dim != INCEPTION_DIM:
        return None
    options.note(f"{path} does not name its backbone; its {stats.dim} features are taken for inception's")
    return "inception"


def _network(loaded: list[FeatureStats], options: FeatureOptions) -> Backbone:
    device = _device(options.device)
    name = options.backbone or (loaded[0].backbone if loaded else None)
    if name is None:
        name = "inception" if options.weights is not None else default_backbone()
        if name != "inception":
            options.note(f"inception's weights are not at hand: comparing {name} features, which give no FID")
    # statistics computed with other weights bear their hash behind the name
    name = name.partition("-")[0]
    _check_choice("the backbone of the statistics", name, BACKBONES)
    network = load_backbone(name, weights=options.weights, device=device, precision=options.precision)
    _check_dims(network.dim, options)
    return network


def _resize(loaded: list[FeatureStats], options: FeatureOptions) -> str:
    if options.resize is not None:
        return options.resize
    recorded = loaded[0].resize if loaded else None
    _check_choice("the resizing of the statistics", recorded, RESIZE_METHODS)
    return recorded or "clean"


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used: {reason}") from error
    return device


def _check_dims(dim: int | None, options: FeatureOptions) -> None:
    if options.dims is not None and options.dims != dim:
        raise InputError(f"--dims must be {dim} for these features, got {options.dims}")


def _check_choice(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise InputError(f"{option} must be one of {', '.join(allowed)}, got {value}")


@contextmanager
def _progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal; yields what to call with the number of images done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
