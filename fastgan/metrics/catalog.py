"""Metrics by the names that ``--metrics`` knows: what each needs, and how it is computed from measured sets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.image_sources import ImageSource
from fastgan.data.label_files import read_label_file
from fastgan.metrics._fid_infinity import (
    LEAST,
    check_plot_path,
    distance_influences,
    fid_infinity,
    least_for_infinity,
)
from fastgan.metrics._fld import fld
from fastgan.metrics._inception_score import inception_score
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.backbones.inception_network import SPATIAL_DIM
from fastgan.metrics.diversity import (
    CMMD_SCALE,
    CMMD_SIGMA,
    authentic,
    cmmd,
    ct_contributions,
    directions,
    informed_distance,
    memorization,
    vendi_score,
)
from fastgan.metrics.features import Measured
from fastgan.metrics.frechet import frechet_distance, paired_frechet_distances
from fastgan.metrics.influences import (
    centered,
    coverage_influences,
    mmd_influences,
    recall_influences,
    score_influences,
    vendi_influences,
)
from fastgan.metrics.kid import gaussian, kernel_distance, polynomial
from fastgan.metrics.prdc import memberships
from fastgan.metrics.stats import FeatureStats

_MEMORIZED = 1000  # an FLD from which on its authors warn

STATISTICS, FEATURES, IMAGES = "statistics", "features", "images"

Source = ImageSource | Measured


@dataclass(frozen=True)
class EvaluateOptions:
    """Names of the metrics, their parameters, and the image file for the plot of the bias."""

    metrics: tuple[str, ...] = ("fid",)
    subsets: int = 100
    subset_size: int = 1000
    splits: int = 10
    k: int = 5
    seed: int = 0
    plot: Path | None = None
    skip_unmet: bool = False
    """Leave out a metric that the sets or the backbone do not allow, with a note that says what it needs."""

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in METRICS:
                raise InputError(f"--metrics must be of {', '.join(METRICS)}, got {metric or 'an empty name'}")
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
class Found:
    """One number of a metric, and what its confidence interval comes from.

    Attributes:
        name: of the number, with these features.
        value: the number.
        influences: returns the influence of each generated image, (m,) of mean 0; or None if they are not defined.
        standard_error: in place of influences, or of random draws that the metric makes beside them.
        spread: printed behind +-.
        note: printed in parentheses.
        details: further values for JSON.
        least: no interval goes below it.
        higher_is_better: the order of sets in a table.
    """

    name: str
    value: float
    influences: Callable[[], Tensor | None] | None = None
    standard_error: float = 0.0
    spread: float | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    least: float | None = 0.0
    higher_is_better: bool = False


@dataclass(frozen=True)
class Sets:
    """Input of a metric: the generated images, the real ones, a second set of these, and a head for class scores."""

    fake: Measured
    real: Measured | None = None
    test: Measured | None = None
    head: Callable[[Tensor], Tensor] | None = None

    def name(self, inceptions: str, others: str) -> str:
        """The metric's name: only Inception's features give it the first; others have the backbone's name in it."""
        return named(inceptions, others, self.fake.stats)

    def features(self, side: str) -> Tensor:
        """Features (n, dim) of ``"fake"``, ``"real"`` or ``"test"``."""
        measured = getattr(self, side)
        assert measured is not None, side
        assert measured.features is not None, side
        return measured.features

    @property
    def real_stats(self) -> FeatureStats:
        """Statistics of the real images."""
        assert self.real is not None
        return self.real.stats


@dataclass(frozen=True)
class Metric:
    """One entry of ``--metrics``.

    Attributes:
        compute: the numbers, from the sets and the options.
        fake, real, test: what is needed of each set: statistics, features or images; "" for nothing. ``test`` is
            ``--floor``'s.
        least: images needed of each set whose features are; a function of the options.
        trained_on: the real images must be those that the generator was trained on.
        classes: fake and real images must have the same classes.
    """

    compute: Callable[[Sets, EvaluateOptions], Iterator[Found]]
    fake: str = FEATURES
    real: str = FEATURES
    test: str = ""
    least: Callable[[EvaluateOptions], int] = lambda options: 2
    trained_on: bool = False
    classes: bool = False


def named(inceptions: str, others: str, stats: FeatureStats) -> str:
    """Return ``inceptions`` for Inception's features, else ``others`` with the backbone in parentheses."""
    backbone = stats.backbone or "unknown backbone"
    if backbone.startswith("inception") and stats.dim == SPATIAL_DIM:
        return "sFID" if (inceptions, backbone) == ("FID", "inception") else f"{others} ({backbone}, spatial features)"
    return inceptions if backbone == "inception" else f"{others} ({backbone})"


def _fid(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    fake, real = sets.fake, sets.real_stats

    def influences() -> Tensor | None:
        return None if fake.features is None else distance_influences(fake.features, fake.stats, real)

    yield Found(sets.name("FID", "FD"), frechet_distance(fake.stats, real), influences)


def _fid_infinity(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    stats = sets.fake.stats
    names = {"backbone": stats.backbone, "protocol": stats.protocol}
    found = fid_infinity(sets.features("fake"), sets.real_stats, **names, seed=options.seed)
    error = found.standard_error
    details = {"standard_error": error}
    name = sets.name("FID-infinity", "FD-infinity")
    yield Found(name, found.value, standard_error=error, spread=error, details=details)


def _kid(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    real, fake = sets.features("real"), sets.features("fake")
    sizes = {"subsets": options.subsets, "subset_size": options.subset_size}
    found = kernel_distance(real, fake, **sizes, seed=options.seed)
    kernel = functools.partial(polynomial, degree=3, gamma=1 / real.shape[1], coef=1.0)
    yield Found(
        sets.name("KID", "KD"),
        found.mean,
        lambda: mmd_influences(real, fake, kernel, seed=options.seed),
        standard_error=found.std / found.subsets**0.5,
        spread=found.standard_error,
        note=f"{found.subsets} subsets of {found.subset_size}",
        details={key: value for key, value in asdict(found).items() if key != "mean"},
        least=None,
    )


def _is(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    assert sets.head is not None
    logits = sets.head(sets.features("fake"))
    found = inception_score(logits, splits=options.splits, seed=options.seed)
    yield Found(
        sets.name("IS", "class score"),
        found.mean,
        lambda: score_influences(logits),
        spread=found.std,
        note=f"{found.splits} splits",
        details={"std": found.std, "splits": found.splits},
        least=1.0,
        higher_is_better=True,
    )


def _prdc(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    real, fake, k = sets.features("real"), sets.features("fake"), options.k
    of_each = memberships(real, fake, k=k)
    influences: dict[str, Callable[[], Tensor | None]] = {
        "precision": lambda: centered(of_each["precision"]),
        "recall": lambda: recall_influences(real, fake, k=k),
        "density": lambda: centered(of_each["density"]),
        "coverage": lambda: coverage_influences(real, fake, k=k),
    }
    for name, contributions in of_each.items():
        value = contributions.mean().item()
        yield Found(name, value, influences[name], note=f"k = {k}", details={"k": k}, higher_is_better=True)


def _sfid(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    fake, real = sets.fake, sets.real
    assert real is not None
    stats, rows, reference = fake.extra, fake.extra_features, real.extra
    assert stats is not None
    assert reference is not None

    def influences() -> Tensor | None:
        return None if rows is None else distance_influences(rows, stats, reference)

    yield Found(sets.name("sFID", "sFD"), frechet_distance(stats, reference), influences)


def _mifid(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    fake, real = sets.features("fake"), sets.features("real")
    nearness, penalty = memorization(real, fake)

    def influences() -> Tensor | None:
        of_distance = distance_influences(fake, sets.fake.stats, sets.real_stats)
        if penalty == 1 or len(nearness) != len(fake):
            return of_distance if penalty == 1 else None
        distance = frechet_distance(sets.fake.stats, sets.real_stats)
        return of_distance / penalty - distance / penalty**2 * centered(nearness)

    details = {"memorization": nearness.mean().item()}
    value = informed_distance(sets.fake.stats, sets.real_stats, penalty)
    yield Found(sets.name("MiFID", "MiFD"), value, influences, details=details)


def _cmmd(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    real, fake = sets.features("real"), sets.features("fake")

    def influences() -> Tensor:
        unit = [directions(rows) for rows in (real, fake)]
        kernel = functools.partial(gaussian, sigma=CMMD_SIGMA)
        return CMMD_SCALE * mmd_influences(unit[0], unit[1], kernel, seed=options.seed)

    yield Found(f"CMMD ({sets.fake.stats.backbone or 'unknown backbone'})", cmmd(real, fake), influences)


def _auth_pct(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    each = authentic(sets.features("real"), sets.features("fake")).double()
    yield Found("AuthPct", 100 * each.mean().item(), lambda: 100 * centered(each), higher_is_better=True)


def _ct(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    each = ct_contributions(sets.features("real"), sets.features("test"), sets.features("fake"))
    yield Found("C_T", each.mean().item(), lambda: centered(each), least=None, higher_is_better=True)


def _fld(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    value = fld(sets.features("real"), sets.features("test"), sets.features("fake"), seed=options.seed)
    note = f"{sets.fake.label} holds copies of training images, it seems" if value > _MEMORIZED else ""
    yield Found(f"FLD ({sets.fake.stats.backbone or 'unknown backbone'})", value, note=note, least=None)


def _vendi(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    fake = sets.features("fake")
    yield Found("Vendi", vendi_score(fake), lambda: vendi_influences(fake), least=1.0, higher_is_better=True)


def _intra_fid(sets: Sets, options: EvaluateOptions) -> Iterator[Found]:
    """The mean over the classes of the distance within each."""
    parts: list[list[FeatureStats]] = []
    names = sets.fake.classes
    for side in ("real", "fake"):
        rows, labels = sets.features(side), getattr(sets, side).labels
        counts = labels.bincount(minlength=len(names)).tolist()
        if few := [f"{name} ({n})" for name, n in zip(names, counts, strict=True) if n < 2]:
            raise InputError(f"--metrics intra-fid needs at least 2 readable {side} images per class: {', '.join(few)}")
        parts.append([FeatureStats(rows.shape[1]).update(rows[labels == c]) for c in range(len(names))])
    values = paired_frechet_distances(*parts)
    details = {"classes": dict(zip(names, values.tolist(), strict=True))}
    yield Found(sets.name("intra-FID", "intra-FD"), values.mean().item(), note="mean of the classes", details=details)


METRICS: dict[str, Metric] = {
    "fid": Metric(_fid, STATISTICS, STATISTICS),
    "fid-infinity": Metric(_fid_infinity, real=STATISTICS, least=lambda options: LEAST),
    "kid": Metric(_kid),
    "is": Metric(_is, IMAGES, "", least=lambda options: options.splits),
    "prdc": Metric(_prdc, least=lambda options: options.k + 1),
    "sfid": Metric(_sfid, IMAGES, IMAGES),
    "mifid": Metric(_mifid, trained_on=True),
    "cmmd": Metric(_cmmd),
    "authpct": Metric(_auth_pct, trained_on=True),
    "ct": Metric(_ct, test=FEATURES, trained_on=True),
    "fld": Metric(_fld, test=FEATURES, least=lambda options: 4, trained_on=True),
    "vendi": Metric(_vendi, real=""),
    "intra-fid": Metric(_intra_fid, IMAGES, IMAGES, classes=True),
}
"""The metrics by their names on the command line."""


def unmet(
    metric: str,
    options: EvaluateOptions,
    fake: Source,
    real: Source | None,
    test: Source | None = None,
    *,
    knows_reference: bool = False,
) -> str | None:
    """Return what ``metric`` needs and these sets do not have, or None.

    ``knows_reference``: the real images are the ones that ``fake`` itself names, which were not trained on.
    """
    needs = METRICS[metric]
    for source, need in ((fake, needs.fake), (real, needs.real), (test, needs.test)):
        if not need:
            continue
        if source is None:
            return "needs a second set of images" if need != needs.test else "needs --floor with images not trained on"
        if isinstance(source, Measured) and need != STATISTICS:
            held = STATISTICS if source.features is None else FEATURES
            if need == IMAGES or source.features is None:
                return f"needs {'images' if need == IMAGES else 'images or features'}, {source.label} holds {held}"
        n, least = number_of(source), needs.least(options)
        if need != STATISTICS and n is not None and n < least:
            return f"needs at least {least} images, {source.label} holds {n}"
    if needs.trained_on and knows_reference:
        return f"needs the images that {fake.label} was trained on as the second set"
    return _unmet_classes(fake, real) if needs.classes else None


def _unmet_classes(fake: Source, real: Source | None) -> str | None:
    sides = [source for source in (fake, real) if isinstance(source, ImageSource)]
    try:
        found = [classes_of(source) for source in sides]
    except InputError as error:
        return f"needs classes on both sides: {error}"
    names = [names for names, _ in found]
    if not all(names):
        return "needs classes on both sides: a folder per class, labels.csv or dataset.json"
    if names[0] != names[1]:
        return f"needs the same classes on both sides, got {', '.join(names[0])} and {', '.join(names[1])}"
    for source, (_, labels) in zip(sides, found, strict=True):
        counts = [labels.count(c) for c in range(len(names[0]))]
        if min(counts) < 2:
            few = names[0][counts.index(min(counts))]
            return f"needs at least 2 images per class, {source.label} holds {min(counts)} of class {few}"
    return None


def unmet_by_network(metric: str, network: Backbone | None, dim: int, fake: Source) -> str | None:
    """Return what ``metric`` needs and the network, with ``dim`` features, does not give, or None."""
    n, needed = number_of(fake), least_for_infinity(dim)
    if metric == "fid-infinity" and n is not None and n < needed:
        return f"needs at least {needed} images for {dim} features, {fake.label} holds {n}"
    if metric == "is" and network is not None and network.head is None:
        return f"needs a backbone with class scores, {network.name} ({dim}) has none"
    if metric == "sfid" and (network is None or not network.extra):
        return "needs Inception with its 2048 features"
    return None


def number_of(source: Source | None) -> int | None:
    """Return the number of images of a source, None if it is not known."""
    if isinstance(source, ImageSource):
        return len(source)
    return None if source is None else source.stats.n


def classes_of(source: ImageSource) -> tuple[tuple[str, ...], list[int]]:
    """Return class names and the class of each image, from a label file beside the images, else from the source."""
    root = Path(source.label)
    found = read_label_file(root, source) if root.is_dir() or root.suffix.lower() == ".zip" else None
    return found or source.classes()
