"""The engine of ``fastgan fid``, ``fastgan evaluate`` and ``fastgan stats save``: metrics of sets of images, each set
read once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fastgan
from fastgan._checks import InputError
from fastgan._progress import progress_bar
from fastgan.data.archives import open_images, read_npz
from fastgan.data.image_sources import ImageSource
from fastgan.distributed import World
from fastgan.metrics._fid_infinity import (
    LEAST,
    BiasCurve,
    InfiniteFrechet,
    bias_curve,
    check_plot_path,
    fid_infinity,
    least_for_infinity,
    plot_bias,
)
from fastgan.metrics._inception_score import InceptionScoreResult, inception_score
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.features import Measured, collect, empty_stats
from fastgan.metrics.frechet import frechet_distance
from fastgan.metrics.kid import KernelDistance, kernel_distance
from fastgan.metrics.moments import as_features, float64_device
from fastgan.metrics.options import FeatureOptions
from fastgan.metrics.prdc import Neighbourhoods, precision_recall
from fastgan.metrics.stats import FeatureStats, check_comparable, joint_precision
from fastgan.metrics.stats_file import FEATURES, holds_statistics, write_npz

METRICS = ("fid", "fid-infinity", "kid", "is", "prdc")
INCEPTION_DIM = 2048

_NEED_BOTH = frozenset(("kid", "prdc"))
_OTHER_NAMES = {"FID": "FD", "FID-infinity": "FD-infinity", "KID": "KD", "IS": "class score"}


@dataclass(frozen=True)
class EvaluateOptions:
    """Which metrics, their parameters, and the image file to draw the bias curve to."""

    metrics: Sequence[str] = ("fid",)
    subsets: int = 100
    subset_size: int = 1000
    splits: int = 10
    k: int = 5
    seed: int = 0
    plot: Path | None = None
    skip_unmet: bool = False
    """Leave out, with a note, a metric that the images are too few for or the backbone has no scores for."""

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in METRICS:
                raise InputError(f"--metrics must be of {', '.join(METRICS)}, got {metric}")
        for option, value, least in (
            ("--subsets", self.subsets, 1),
            ("--subset-size", self.subset_size, 2),
            ("--splits", self.splits, 1),
            ("-k", self.k, 1),
        ):
            if value < least:
                raise InputError(f"{option} must be at least {least}, got {value}")
        if self.plot is not None:
            check_plot_path(self.plot)


@dataclass(frozen=True)
class Evaluation:
    """The results; None for what was not asked for.

    Attributes:
        sides: the images and, if there is one, the reference.
        floor: the distance of the reference to ``second_split``, another split of the same data: what a perfect
            generator would get.
    """

    sides: tuple[Measured, ...]
    second_split: Measured | None = None
    fid: float | None = None
    floor: float | None = None
    fid_infinity: InfiniteFrechet | None = None
    kid: KernelDistance | None = None
    score: InceptionScoreResult | None = None
    neighbourhoods: Neighbourhoods | None = None
    curve: BiasCurve | None = None

    def name(self, metric: str) -> str:
        """The name of ``"FID"``, ``"FID-infinity"``, ``"KID"`` or ``"IS"`` with these features: only Inception's give
        these, others a distance with the backbone's name."""
        backbone = next((side.stats.backbone for side in self.sides if side.stats.backbone), None)
        return metric if backbone == "inception" else f"{_OTHER_NAMES[metric]} ({backbone or 'unknown backbone'})"

    def lines(self) -> list[str]:
        """For people: the sets, then a line a metric."""
        lines = [side.describe() for side in self.sides]
        if self.second_split is not None:
            lines += [self.second_split.describe(), f"floor, the last two sets' {self.name('FID')}:  {self.floor}"]
        if (kid := self.kid) is not None:
            lines.append(
                f"{self.name('KID')}:  {kid.mean} +- {kid.standard_error} ({kid.subsets} subsets of {kid.subset_size})"
            )
        if (score := self.score) is not None:
            lines.append(f"{self.name('IS')}:  {score.mean} +- {score.std} ({score.splits} splits)")
        if (near := self.neighbourhoods) is not None:
            names = ("precision", "recall", "density", "coverage")
            lines.append(", ".join(f"{name} {getattr(near, name):.4f}" for name in names) + f" (k = {near.k})")
        if (infinite := self.fid_infinity) is not None:
            lines.append(f"{self.name('FID-infinity')}:  {infinite.value} +- {infinite.standard_error}")
        if self.fid is not None:
            lines.append(f"{self.name('FID')}:  {self.fid}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For the JSON of ``fastgan evaluate``."""
        parts = {
            "fid_infinity": self.fid_infinity,
            "kid": self.kid,
            "is": self.score,
            "prdc": self.neighbourhoods,
            "bias_curve": self.curve,
        }
        found = {key: asdict(part) for key, part in parts.items() if part is not None}
        return {"fid": self.fid} | self._floor_dict() | found | {"metric": self.name("FID")} | self._sides_dict()

    def as_fid_dict(self) -> dict[str, Any]:
        """For the JSON of ``fastgan fid``."""
        return {"metric": self.name("FID"), "value": self.fid} | self._sides_dict() | self._floor_dict()

    def _sides_dict(self) -> dict[str, Any]:
        stats = [side.stats for side in self.sides]
        return {
            "backbone": next((s.backbone for s in stats if s.backbone), None),
            "dim": stats[0].dim,
            "protocol": next((s.protocol for s in stats if s.protocol), None),
            "resize": next((s.resize for s in stats if s.resize), None),
            "precision": joint_precision(s.precision for s in stats),
            "paths": [side.label for side in self.sides],
            "n": [s.n for s in stats],
            "skipped": [side.skipped for side in self.sides],
            "left_out": [side.left_out for side in self.sides],
            "fastgan_version": fastgan.__version__,
        }

    def _floor_dict(self) -> dict[str, Any]:
        second = self.second_split
        return {} if second is None else {"floor": self.floor, "floor_path": second.label, "floor_n": second.stats.n}

    def plot(self, path: Path) -> None:
        """Draw the bias curve to an image file. Raises ``InputError`` if it cannot be written."""
        if self.curve is not None:
            limit = None if self.fid_infinity is None else self.fid_infinity.value
            plot_bias(self.curve, path, label=self.name("FID"), floor=self.floor, limit=limit)

    def finish(self) -> None:
        """Remove the checkpoints: to be called once the result is printed and written."""
        for side in (*self.sides, *([] if self.second_split is None else [self.second_split])):
            side.finish()


def evaluate(
    a: Path | ImageSource | Measured,
    b: Path | ImageSource | None,
    options: FeatureOptions,
    what: EvaluateOptions,
    *,
    floor: Path | None = None,
    world: World | None = None,
) -> Evaluation:
    """Measure the images ``a`` against ``b``, by default the reference that ``a`` itself names.

    Everything is checked before any feature is computed.

    Args:
        a: images: a folder, a zip file, an npz, or what an opener of :mod:`fastgan.data.archives` knows; for ``fid``
            alone also an npz of statistics.
        b: the same, where an npz of statistics gives the Frechet distances alone.
        floor: a second split of the images of ``b``, by default the one that ``a`` names beside its reference.

    Raises:
        InputError: a source or an option cannot be used, or a metric needs what is not there.
    """
    world, metrics = world or World(), set(what.metrics)
    with world.agreed():
        fakes = open_source(a, options)
        reals, split = _references(fakes, b, floor, options, what)
        _check_images(fakes, reals, what)
    sources = [source for source in (fakes, reals, split) if source is not None]
    keep = [what.plot is not None or metrics != {"fid"}, bool(_NEED_BOTH & metrics), False][: len(sources)]

    def check(network: Backbone | None, dim: int) -> None:
        """Leave out of ``metrics`` what cannot be had, or raise ``InputError``, before any feature is computed."""
        unmet = {}
        n, needed = _number_of(fakes), least_for_infinity(dim)
        if "fid-infinity" in metrics and n is not None and n < needed:
            unmet["fid-infinity"] = f"needs at least {needed} images for {dim} features, {fakes.label} holds {n}"
        if "is" in metrics and network is not None and network.head is None:
            unmet["is"] = f"needs a backbone with class scores, {network.name} ({dim}) has none"
        for metric, reason in unmet.items():
            if not what.skip_unmet:
                raise InputError(f"--metrics {metric} {reason}")
            metrics.discard(metric)
            if world.is_first:
                options.note(f"{metric} is left out: it {reason}")

    sides, network = measure(sources, options, world, keep_features=keep, check=check)

    fake, *others = sides
    features, found = fake.features, dict[str, Any]()
    if "is" in metrics and features is not None and network is not None and network.head is not None:
        logits = network.head(features.to(network.device))
        found["score"] = inception_score(logits, splits=what.splits, seed=what.seed)
    if not others:
        return Evaluation((fake,), **found)
    real = others[0]
    if "fid" in metrics:
        found["fid"] = frechet_distance(fake.stats, real.stats)
    if len(others) > 1:
        found |= {"second_split": others[1], "floor": frechet_distance(real.stats, others[1].stats)}
    if features is not None:
        stats = fake.stats
        if "fid-infinity" in metrics:
            names = {"backbone": stats.backbone, "protocol": stats.protocol}
            found["fid_infinity"] = fid_infinity(features, real.stats, **names, seed=what.seed)
        if what.plot is not None:
            found["curve"] = bias_curve(features, real.stats, seed=what.seed)
        if real.features is not None and "kid" in metrics:
            sizes = {"subsets": what.subsets, "subset_size": what.subset_size}
            found["kid"] = kernel_distance(real.features, features, **sizes, seed=what.seed)
        if real.features is not None and "prdc" in metrics:
            found["neighbourhoods"] = precision_recall(real.features, features, k=what.k)
    return Evaluation((fake, real), **found)


def save_stats(
    images: Path,
    output: Path,
    options: FeatureOptions,
    world: World | None = None,
    *,
    root: bool = False,
    features: bool = False,
) -> Measured:
    """Write the statistics of ``images`` to ``output``, an .npz file; ``root`` as in :meth:`FeatureStats.save`.

    ``features`` writes them too, (n, dim) float32: such a file stands for the images in every metric but the inception
    score.

    Raises:
        InputError: a path or an option cannot be used; ``output`` is then as it was.
    """
    world = world or World()
    if output.suffix != ".npz":
        raise InputError(f"statistics are written to an .npz file, got {output}")
    if not output.parent.is_dir():
        raise InputError(f"cannot write {output}: its folder does not exist")
    with world.agreed():
        source = open_images(images, skip_bad=options.skip_bad)
    (side,), _ = measure([source], options, world, keep_features=[features])
    with world.agreed():
        if world.is_first:
            arrays = side.stats.to_arrays(root=root)
            if side.features is not None:
                arrays[FEATURES] = side.features.numpy()
            write_npz(output, arrays)
    return side


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


def open_source(source: Path | ImageSource | Measured, options: FeatureOptions) -> ImageSource | Measured:
    """Open a path: a file of statistics or features is read, images are not yet."""
    if isinstance(source, ImageSource | Measured):
        return source
    features, suffix = None, source.suffix.lower()
    if suffix == ".npy" and source.is_file() and _holds_features(source):
        features = as_features(str(source), np.load(source, allow_pickle=False))
        stats = FeatureStats(backbone=options.backbone).update(features)
    elif suffix != ".npz" or source.is_dir() or not holds_statistics(source):
        return open_images(source, skip_bad=options.skip_bad)
    else:
        arrays = read_npz(source)
        features = as_features(str(source), arrays[FEATURES]) if FEATURES in arrays else None
        if features is not None and "mu" not in arrays:
            stats = FeatureStats(backbone=options.backbone).update(features)
        else:
            stats = FeatureStats.from_arrays(source, arrays)
    named = options.backbone is not None or options.weights is not None  # then the file's is taken for the same
    if stats.backbone is None and not named and stats.dim == INCEPTION_DIM:  # as pytorch-fid's and clean-fid's files
        options.note(f"{source} does not name its backbone; its {stats.dim} features are taken for inception's")
        stats.backbone = "inception"
    return Measured(str(source), stats, features)


def _holds_features(path: Path) -> bool:
    """Whether an npy file holds vectors (n, dim) and not images."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).ndim == 2
    except (OSError, ValueError, EOFError):
        return False  # as images it is read again, and then the error says what is wrong


def _references(
    fakes: ImageSource | Measured,
    b: Path | ImageSource | None,
    floor: Path | None,
    options: FeatureOptions,
    what: EvaluateOptions,
) -> tuple[ImageSource | Measured | None, ImageSource | Measured | None]:
    """The images to compare with, and the second split of them; None where there is none."""
    own = fakes if b is None and isinstance(fakes, ImageSource) else None
    given = b if own is None else own.reference
    if given is None:
        if tuple(what.metrics) == ("is",) and what.plot is None:
            return None, None
        raise InputError(f"{fakes.label} names no reference to compare it with: give a second set of images")
    reference = open_source(given, options)
    needing = [metric for metric in what.metrics if metric in _NEED_BOTH]
    if isinstance(reference, Measured) and reference.features is None and needing:
        raise InputError(
            f"--metrics {','.join(needing)} needs images on both sides, {reference.label} holds statistics"
        )
    if floor is not None:
        return reference, open_source(floor, options)
    if own is not None and ("fid" in what.metrics or what.plot is not None):
        return reference, own.second_split
    return reference, None


def _check_images(
    fakes: ImageSource | Measured, reference: ImageSource | Measured | None, what: EvaluateOptions
) -> None:
    """Raise ``InputError`` unless there are as many images as each metric needs."""
    if tuple(what.metrics) == ("fid",) and what.plot is None:  # statistics do; two images are needed for any
        return
    if isinstance(fakes, Measured) and (fakes.features is None or "is" in what.metrics):
        held = "statistics" if fakes.features is None else "features"
        raise InputError(f"--metrics {','.join(what.metrics)} needs images, {fakes.label} holds {held}")
    least = {"fid-infinity": LEAST, "is": what.splits, "prdc": what.k + 1}
    for metric in what.metrics:
        needed = least.get(metric, 2)
        for source in (fakes, reference) if metric in _NEED_BOTH else (fakes,):
            n = _number_of(source)
            if source is not None and n is not None and n < needed:
                held = f"{source.label} holds {n}"
                raise InputError(f"--metrics {metric} needs at least {needed} images, {held}")


def _number_of(source: ImageSource | Measured | None) -> int | None:
    """Images of a source, as far as known."""
    if isinstance(source, ImageSource):
        return len(source)
    return None if source is None else source.stats.n


def measure(
    sources: Sequence[ImageSource | Measured],
    options: FeatureOptions,
    world: World,
    *,
    keep_features: Sequence[bool],
    check: Callable[[Backbone | None, int], None] | None = None,
) -> tuple[list[Measured], Backbone | None]:
    """Statistics of each source, and features where ``keep_features`` says so, and the one network that computes them;
    None where all sources are statistics.

    Args:
        check: called with the network and the number of features before any is computed.

    Raises:
        InputError: the sources or the options do not fit each other, a set has fewer than two images, or an image
            cannot be read.
    """
    loaded = [source.stats for source in sources if isinstance(source, Measured)]
    images = [source for source in sources if isinstance(source, ImageSource)]
    for source in images:
        if len(source) < 2:
            raise InputError(f"{source.label} must hold at least 2 images for a covariance, it holds {len(source)}")
    if not images:
        for stats in loaded[1:]:
            check_comparable(loaded[0], stats)
        for stats in loaded:
            stats.backbone = stats.backbone or options.backbone
        if options.dims not in (None, loaded[0].dim):
            raise InputError(f"--dims must be {loaded[0].dim} for these statistics, got {options.dims}")
        if check is not None and loaded[0].dim is not None:
            check(None, loaded[0].dim)
        return [source for source in sources if isinstance(source, Measured)], None
    network = options.network(loaded, world, next((source.backbone for source in images if source.backbone), None))
    if check is not None and network.dim is not None:
        check(network, network.dim)
    protocol = options.chosen_protocol(loaded, network)
    if sum(map(len, images)) >= network.compile_from * world.size:
        network.compile()
    for stats in loaded:
        check_comparable(stats, empty_stats(network, protocol))
        stats.backbone = network.name
        stats.to(float64_device(network.device))
    measured = []
    for each, keep in zip(sources, keep_features, strict=True):
        if isinstance(each, ImageSource):
            with progress_bar(quiet=options.quiet or not world.is_first) as bar:
                task = bar.add_task(each.label, total=len(world.share(len(each))))
                each = collect(
                    each,
                    network,
                    protocol=protocol,
                    batch_size=options.batch_size,
                    num_workers=options.num_workers,
                    keep_features=keep,
                    progress=functools.partial(bar.advance, task) if world.is_first else None,
                    world=world,
                    checkpoint=options.checkpoint,
                )
        measured.append(each)
    return measured, network
