"""The engine of ``fastgan fid``, ``fastgan evaluate`` and ``fastgan stats save``: metrics of sets of images, each set
read once."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgan._checks import InputError, check_features
from fastgan._progress import progress_bar
from fastgan.data.archives import open_images, read_npz
from fastgan.data.image_sources import ImageSource
from fastgan.distributed import World
from fastgan.metrics._fid_infinity import BiasCurve, bias_curve, plot_bias
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.backbones.inception_network import SPATIAL, SPATIAL_DIM
from fastgan.metrics.catalog import (
    METRICS,
    STATISTICS,
    EvaluateOptions,
    Found,
    Sets,
    Source,
    classes_of,
    named,
    unmet,
    unmet_by_network,
)
from fastgan.metrics.features import Measured, collect, empty_stats
from fastgan.metrics.frechet import frechet_distance
from fastgan.metrics.moments import as_features, float64_device
from fastgan.metrics.options import FeatureOptions
from fastgan.metrics.protocols import get_protocol
from fastgan.metrics.results import SetResult, Value, measured_dict, result_dict
from fastgan.metrics.stats import FeatureStats, check_comparable
from fastgan.metrics.stats_file import FEATURES, check_statistics_path, holds_statistics, write_npz

INCEPTION_DIM = 2048


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one set, and what they were computed from.

    Attributes:
        result: the set and its numbers, by name.
        reference: the real images, if there are any.
        second_split: other real images.
        floor: the distance of the reference to ``second_split``: what a perfect generator would get.
        curve: the distance over the number of images, if it is to be drawn.
        limit: FID-infinity, if it was computed.
        not_computed: why ``--metrics all`` left a metric out.
    """

    result: SetResult
    reference: Measured | None = None
    second_split: Measured | None = None
    floor: float | None = None
    curve: BiasCurve | None = None
    limit: float | None = None
    not_computed: dict[str, str] = field(default_factory=dict)

    @property
    def sides(self) -> list[Measured]:
        """All measured sets: the images, the reference, the second split."""
        return [side for side in (self.result.measured, self.reference, self.second_split) if side is not None]

    @property
    def values(self) -> dict[str, Value]:
        """The numbers, by name."""
        return self.result.values

    @property
    def distance_name(self) -> str:
        """``FID`` or the name of the distance with these features."""
        return named("FID", "FD", self.result.measured.stats)

    def lines(self) -> list[str]:
        """Return one line per set, then one per number, the FID last."""
        lines = [side.describe() for side in self.sides]
        if self.floor is not None:
            lines.append(f"floor, the last two sets' {self.distance_name}:  {self.floor:.6g}")
        numbers = self.result.lines()
        last = [line for line in numbers if line.startswith(f"{self.distance_name}:")]
        return [*lines, *(line for line in numbers if line not in last), *last]

    def times(self) -> list[str]:
        """Return one line per set whose images were read, with the seconds of each stage."""
        return [f"{side.label}: {side.times.describe()}" for side in self.sides if side.times is not None]

    def as_dict(self) -> dict[str, Any]:
        """Return the object for JSON, in the shape of :mod:`fastgan.metrics.results`."""
        floor = None if self.second_split is None else measured_dict(self.second_split) | {"value": self.floor}
        curve = None if self.curve is None else asdict(self.curve)
        others = {"floor": floor, "bias_curve": curve, "not_computed": self.not_computed}
        return result_dict([self.result], self.reference, **others)

    def plot(self, path: Path) -> None:
        """Draw the bias curve to an image file. Raises ``InputError`` if it cannot be written."""
        if self.curve is not None:
            plot_bias(self.curve, path, label=self.distance_name, floor=self.floor, limit=self.limit)

    def finish(self) -> None:
        """Remove the checkpoints: to be called once the result is printed and written."""
        for side in self.sides:
            side.finish()


def evaluate(
    a: Path | Source,
    b: Path | Source | None,
    options: FeatureOptions,
    what: EvaluateOptions,
    *,
    floor: Path | None = None,
    world: World | None = None,
) -> Evaluation:
    """Measure the images ``a`` against ``b``, by default the reference that ``a`` itself names.

    Everything is checked before any feature is computed.

    Args:
        a: images: a folder, a zip file, an npz, or what an opener of :mod:`fastgan.data.archives` knows; where a metric
            needs no more, also a file of features or statistics.
        b: the same.
        floor: a second split of the images of ``b``, by default the one that ``a`` names beside its reference.

    Raises:
        InputError: a source or an option cannot be used, or a metric needs what is not there.
    """
    world = world or World()
    choice = Choice(what, options, world)
    with world.agreed():
        fakes = open_source(a, options)
        reals, split = _references(fakes, b, floor, options, what)
        for metric in what.metrics:
            reason = unmet(metric, what, fakes, reals, split, knows_reference=b is None)
            choice.leave_out(metric, reason)
        if what.plot is not None and isinstance(fakes, Measured) and fakes.features is None:
            raise InputError(f"--plot needs images or features, {fakes.label} holds statistics")
    sources = [source for source in (fakes, reals, split) if source is not None]
    kept = [choice.needs("fake") or what.plot is not None, choice.needs("real"), choice.needs("test")]
    sides, network = measure(sources, options, world, keep_features=kept[: len(sources)], choice=choice, fakes=[fakes])
    if "intra-fid" in choice.metrics:
        sides = [with_classes(side, source) for side, source in zip(sides, sources, strict=True)]
    fake, real, test, *_ = *sides, None, None
    assert fake is not None
    (found,) = compute(choice, [Sets(fake, real, test, head_of(network))])
    values = {one.name: Value(one.value, **printed(one)) for _, one in found}
    extras: dict[str, Any] = {"limit": next((one.value for key, one in found if key == "fid-infinity"), None)}
    if real is not None and test is not None:
        extras |= {"second_split": test, "floor": frechet_distance(real.stats, test.stats)}
    if real is not None and what.plot is not None and fake.features is not None:
        extras["curve"] = bias_curve(fake.features, real.stats, seed=what.seed)
    return Evaluation(SetResult(fake, values), real, not_computed=choice.left_out, **extras)


class Choice:
    """The metrics that are computed; :meth:`leave_out` takes one away with a note, or refuses.

    Attributes:
        metrics: the names of those that are left.
        left_out: the reasons for the others.
    """

    def __init__(self, what: EvaluateOptions, options: FeatureOptions, world: World) -> None:
        self.what = what
        self.metrics = [name for name in METRICS if name in what.metrics]
        self.metrics.sort(key=what.metrics.index)
        self.left_out: dict[str, str] = {}
        self._options, self._world = options, world

    def leave_out(self, metric: str, reason: str | None) -> None:
        """Do nothing without a reason. Raises ``InputError`` unless metrics are left out with ``skip_unmet``."""
        if reason is None or metric not in self.metrics:
            return
        if not self.what.skip_unmet:
            raise InputError(f"--metrics {metric} {reason}")
        self.metrics.remove(metric)
        self.left_out[metric] = reason
        if self._world.is_first:
            self._options.note(f"{metric} is left out: it {reason}")

    def check_network(self, network: Backbone | None, dim: int, fakes: Sequence[Source]) -> None:
        """Leave out what the network cannot give."""
        for metric in list(self.metrics):
            for fake in fakes:
                self.leave_out(metric, unmet_by_network(metric, network, dim, fake))

    def needs(self, side: str) -> bool:
        """Return whether a metric needs features of ``"fake"``, ``"real"`` or ``"test"``."""
        return any(getattr(METRICS[name], side) not in ("", STATISTICS) and name != "sfid" for name in self.metrics)


def compute(choice: Choice, sets: Sequence[Sets]) -> list[list[tuple[str, Found]]]:
    """Return the numbers of each of ``sets``, each number with the metric that it belongs to.

    A metric that the features of one set do not allow is an error, or left out of ``choice`` for all sets.
    """
    found: list[list[tuple[str, Found]]] = [[] for _ in sets]
    for metric in list(choice.metrics):
        try:
            numbers = [[(metric, one) for one in METRICS[metric].compute(each, choice.what)] for each in sets]
        except InputError as error:
            if not choice.what.skip_unmet:
                raise
            choice.leave_out(metric, f"cannot be computed of these features: {error}")
            continue
        for of_set, more in zip(found, numbers, strict=True):
            of_set += more
    return found


def printed(found: Found) -> dict[str, Any]:
    """Return the fields of a :class:`Value` that come from the metric."""
    return {key: getattr(found, key) for key in ("spread", "note", "details", "higher_is_better")}


def head_of(network: Backbone | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function from features (n, dim) on any device to class scores; None if the network has none."""
    if network is None or network.head is None:
        return None
    head, device = network.head, network.device
    return lambda features: head(features.to(device))


def with_classes(side: Measured, source: Source) -> Measured:
    """Return ``side`` with the class of each row of its features."""
    if not isinstance(source, ImageSource):
        return side
    names, labels = classes_of(source)
    unread = set(side.skipped)
    rows = [label for i, label in enumerate(labels) if not unread or source.name(i) not in unread]
    return replace(side, classes=names, labels=torch.tensor(rows))


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
    check_statistics_path(output)
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
    merged, seen = FeatureStats(), set()
    for file in files:
        if (place := file.resolve()) in seen:
            raise InputError(f"{file} is given twice: its images would count twice")
        seen.add(place)
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
        features = _checked(source, np.load(source, allow_pickle=False))
        stats = FeatureStats(backbone=options.backbone).update(features)
    elif suffix != ".npz" or source.is_dir() or not holds_statistics(source):
        return open_images(source, skip_bad=options.skip_bad)
    else:
        arrays = read_npz(source)
        features = _checked(source, arrays[FEATURES]) if FEATURES in arrays else None
        if features is not None and "mu" not in arrays:
            stats = FeatureStats(backbone=options.backbone).update(features)
        else:
            stats = FeatureStats.from_arrays(source, arrays)
    named = options.backbone is not None or options.weights is not None  # then the file's is taken for the same
    if stats.backbone is None and not named and stats.dim == INCEPTION_DIM:  # as pytorch-fid's and clean-fid's files
        options.note(f"{source} does not name its backbone; its {stats.dim} features are taken for inception's")
        stats.backbone = "inception"
    return Measured(str(source), stats, features)


def _checked(path: Path, array: np.ndarray) -> torch.Tensor:
    features = as_features(str(path), array)
    check_features(least=2, **{str(path): features})
    return features


def _check_options(side: Measured, options: FeatureOptions) -> None:
    """Raise ``InputError`` if ``options`` ask for what the statistics of ``side``, as far as they tell, are not of."""
    stats = side.stats
    recorded = re.sub(r"-[0-9a-f]{8}$", "", stats.backbone or "")
    if options.backbone is not None and recorded not in ("", options.backbone):
        raise InputError(f"--backbone {options.backbone} does not fit {side.label}, whose backbone is {stats.backbone}")
    if stats.protocol is not None and (options.protocol or options.resize):
        asked = get_protocol(options.protocol or stats.protocol, options.resize).name
        if asked != stats.protocol:
            raise InputError(f"protocol {asked} does not fit {side.label}, whose protocol is {stats.protocol}")


def _holds_features(path: Path) -> bool:
    """Return whether an npy file holds vectors (n, dim) rather than images."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).ndim == 2
    except (OSError, ValueError, EOFError):
        return False  # as images it is read again, and then the error says what is wrong


def _references(
    fakes: Source, b: Path | Source | None, floor: Path | None, options: FeatureOptions, what: EvaluateOptions
) -> tuple[Source | None, Source | None]:
    """Return the images to compare with and a second split of them, each None if there is none."""
    own = fakes if b is None and isinstance(fakes, ImageSource) else None
    given = b if own is None else own.reference
    if given is None:
        if what.plot is None and all(not METRICS[name].real for name in what.metrics):
            return None, None
        raise InputError(f"{fakes.label} names no reference to compare it with: give a second set of images")
    reference = open_source(given, options)
    if floor is not None:
        return reference, open_source(floor, options)
    if own is not None and ("fid" in what.metrics or what.plot is not None):
        return reference, own.second_split
    return reference, None


def measure(
    sources: Sequence[ImageSource | Measured],
    options: FeatureOptions,
    world: World,
    *,
    keep_features: Sequence[bool],
    choice: Choice | None = None,
    fakes: Sequence[Source] = (),
) -> tuple[list[Measured], Backbone | None]:
    """Statistics of each source, and features where ``keep_features`` says so, and the one network that computes them;
    None where all sources are statistics.

    Args:
        choice: the metrics to compute; those that the network cannot give for ``fakes`` are left out of it.

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
        for side in sources:
            if isinstance(side, Measured):
                _check_options(side, options)
        for stats in loaded:
            stats.backbone = stats.backbone or options.backbone
        if options.dims is not None and {SPATIAL: SPATIAL_DIM}.get(str(options.dims), options.dims) != loaded[0].dim:
            raise InputError(f"--dims must be {loaded[0].dim} for these statistics, got {options.dims}")
        if choice is not None and loaded[0].dim is not None:
            choice.check_network(None, loaded[0].dim, fakes)
        return [source for source in sources if isinstance(source, Measured)], None
    own = next((source.backbone for source in images if source.backbone), None)
    network = options.network(loaded, world, own, spatial=choice is not None and "sfid" in choice.metrics)
    if choice is not None and network.dim is not None:
        choice.check_network(network, network.dim, fakes)
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
