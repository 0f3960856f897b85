"""What ``fastgan evaluate`` does: several metrics of one set of images, most against a reference, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.archives import open_images
from fastgan.data.image_sources import ImageSource
from fastgan.distributed import World
from fastgan.metrics._fid_infinity import LEAST, InfiniteFrechet, fid_infinity
from fastgan.metrics._inception_score import InceptionScoreResult, inception_score
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.bias import BiasCurve, bias_curve
from fastgan.metrics.compare import Side, StatsFile, describe_sides, distance_label, measure, open_source
from fastgan.metrics.frechet import frechet_distance
from fastgan.metrics.kid import KernelDistance, kernel_distance
from fastgan.metrics.options import FeatureOptions
from fastgan.metrics.prdc import Neighbourhoods, precision_recall

METRICS = ("fid", "fid-infinity", "kid", "is", "prdc")
DEFAULT_METRICS = ("fid", "kid", "prdc")
_NEED_BOTH = frozenset(("kid", "prdc"))


@dataclass(frozen=True)
class EvaluateOptions:
    """Which metrics, and their parameters."""

    metrics: Sequence[str] = DEFAULT_METRICS
    subsets: int = 100
    subset_size: int = 1000
    splits: int = 10
    k: int = 5
    seed: int = 0
    bias_curve: bool = False

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


@dataclass(frozen=True)
class Evaluation:
    """All that was found; None for what was not asked for. ``sides`` are the images and maybe the reference."""

    sides: tuple[Side, ...]
    fid: float | None = None
    floor: float | None = None
    floor_side: Side | None = None
    fid_infinity: InfiniteFrechet | None = None
    kid: KernelDistance | None = None
    score: InceptionScoreResult | None = None
    neighbourhoods: Neighbourhoods | None = None
    curve: BiasCurve | None = None

    @property
    def all_sides(self) -> tuple[Side, ...]:
        """With that of the floor, where there is one."""
        return self.sides if self.floor_side is None else (*self.sides, self.floor_side)

    def name(self, metric: str) -> str:
        """The metric's name with these features."""
        return distance_label(self.sides[0].stats.backbone, metric)

    def lines(self) -> list[str]:
        """For people: the sets, then a line a metric."""
        lines = [side.describe() for side in self.sides]
        if self.floor_side is not None:
            lines += [self.floor_side.describe(), f"floor, the last two sets' {self.name('FID')}:  {self.floor}"]
        if (kid := self.kid) is not None:
            lines.append(f"{self.name('KID')}:  {kid.mean} +- {kid.std} ({kid.subsets} subsets of {kid.subset_size})")
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
        """For JSON."""
        found: dict[str, Any] = {"fid": self.fid}
        if self.floor_side is not None:
            found |= {"floor": self.floor, "floor_path": self.floor_side.label, "floor_n": self.floor_side.stats.n}
        parts = {
            "fid_infinity": self.fid_infinity,
            "kid": self.kid,
            "is": self.score,
            "prdc": self.neighbourhoods,
            "bias_curve": self.curve,
        }
        found |= {key: asdict(part) for key, part in parts.items() if part is not None}
        return found | {"metric": self.name("FID")} | describe_sides(self.sides)


def evaluate(
    a: Path | ImageSource,
    b: Path | ImageSource | None,
    options: FeatureOptions,
    what: EvaluateOptions,
    *,
    floor: Path | None = None,
    world: World | None = None,
) -> Evaluation:
    """Measure the images ``a`` against ``b``, by default the reference that ``a`` itself names.

    Args:
        a: images: a folder, a zip file, an npz, or what an opener of :mod:`fastgan.data.archives` knows.
        b: the same, or an npz of statistics, with which the Frechet distances alone can be had.
        floor: a second split of the images of ``b``, by default the one that ``a`` names beside its reference.

    Raises:
        InputError: a source or an option cannot be used, or a metric needs what is not there.
    """
    world = world or World()
    with world.agreed():
        fakes = a if isinstance(a, ImageSource) else open_images(a, skip_bad=options.skip_bad)
        reference = _reference(fakes, b, options, what)
        second_split = None if reference is None else _second_split(fakes, b, floor, options, what)
        _check_numbers(fakes, reference, what)
    extra = [] if second_split is None else [second_split]
    sources = [fakes, *([] if reference is None else [reference]), *extra]
    network = options.network([s.stats for s in sources if isinstance(s, StatsFile)], world)
    if "is" in what.metrics and network.head is None:
        raise InputError(f"--metrics is needs a backbone with class scores, {network.name} ({network.dim}) has none")
    keep_fakes = what.bias_curve or bool({"fid-infinity", "kid", "is", "prdc"} & set(what.metrics))
    keep_reals = bool(_NEED_BOTH & set(what.metrics))
    keep = [keep_fakes, *([] if reference is None else [keep_reals]), *([False] * len(extra))]
    sides = measure(sources, options, world, keep_features=keep, network=network)
    return _evaluation(sides, reference is not None, network, what)


def _check_numbers(fakes: ImageSource, reference: ImageSource | StatsFile | None, what: EvaluateOptions) -> None:
    """Before anything is computed: that there are as many images as each metric needs."""
    least = {"fid-infinity": LEAST, "is": what.splits, "prdc": what.k + 1}
    for metric in what.metrics:
        needed = least.get(metric, 2)
        for source in (fakes, reference) if metric in _NEED_BOTH else (fakes,):
            if isinstance(source, ImageSource) and len(source) < needed:
                held = f"{source.label} holds {len(source)}"
                raise InputError(f"--metrics {metric} needs at least {needed} images, {held}")


def _reference(
    fakes: ImageSource, b: Path | ImageSource | None, options: FeatureOptions, what: EvaluateOptions
) -> ImageSource | StatsFile | None:
    given = fakes.reference if b is None else b
    if given is None:
        if tuple(what.metrics) == ("is",) and not what.bias_curve:
            return None
        raise InputError(f"{fakes.label} names no reference to compare it with: give a second set of images")
    reference = open_source(given, options) if isinstance(given, Path) else given
    needing = [metric for metric in what.metrics if metric in _NEED_BOTH]
    if isinstance(reference, StatsFile) and needing:
        raise InputError(f"--metrics {','.join(needing)} needs images on both sides, {reference.path} holds statistics")
    return reference


def _second_split(
    fakes: ImageSource, b: Path | ImageSource | None, floor: Path | None, options: FeatureOptions, what: EvaluateOptions
) -> ImageSource | StatsFile | None:
    if floor is not None:
        return open_source(floor, options)
    return fakes.second_split if b is None and ("fid" in what.metrics or what.bias_curve) else None


def _evaluation(sides: list[Side], has_reference: bool, network: Backbone, what: EvaluateOptions) -> Evaluation:
    fake, *others = sides
    features, metrics = fake.collected.features, set(what.metrics)
    score = None
    if "is" in metrics and features is not None and network.head is not None:
        score = inception_score(network.head(features.to(network.device)), splits=what.splits, seed=what.seed)
    if not has_reference:
        return Evaluation((fake,), score=score)
    real = others[0]
    floor_side = others[1] if len(others) > 1 else None
    infinite = curve = None
    if features is not None:
        stats = fake.stats
        if "fid-infinity" in metrics:
            infinite = fid_infinity(features, real.stats, backbone=stats.backbone, resize=stats.resize, seed=what.seed)
        if what.bias_curve:
            curve = bias_curve(features, real.stats, seed=what.seed)
    return Evaluation(
        (fake, real),
        fid=frechet_distance(fake.stats, real.stats) if "fid" in metrics else None,
        floor=None if floor_side is None else frechet_distance(real.stats, floor_side.stats),
        floor_side=floor_side,
        fid_infinity=infinite,
        kid=_kid(real, features, what) if "kid" in metrics else None,
        score=score,
        neighbourhoods=_prdc(real, features, what) if "prdc" in metrics else None,
        curve=curve,
    )


def _kid(real: Side, fake: Tensor | None, what: EvaluateOptions) -> KernelDistance:
    assert real.collected.features is not None
    assert fake is not None
    size, subsets = what.subset_size, what.subsets
    return kernel_distance(real.collected.features, fake, subsets=subsets, subset_size=size, seed=what.seed)


def _prdc(real: Side, fake: Tensor | None, what: EvaluateOptions) -> Neighbourhoods:
    assert real.collected.features is not None
    assert fake is not None
    return precision_recall(real.collected.features, fake, k=what.k)
