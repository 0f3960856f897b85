"""Many sets of images against one reference: one pass each, confidence intervals, and which differences are noise.

Intervals are of a bootstrap over the images of a set, of each metric to first order: the resampled quantity is the mean
of every image's influence on the metric, so that 1000 resamples need no second pass and no second distance. The
reference is held fixed, as it is common to all sets. Where an influence belongs to the reference's images (recall,
coverage), the two sets of a comparison are resampled together, pair by pair.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan._files import atomic_path
from fastgan.distributed import World
from fastgan.metrics._fid_infinity import check_plot_path, distance_influences
from fastgan.metrics.evaluate import measure as measure_sources
from fastgan.metrics.evaluate import open_source
from fastgan.metrics.features import Measured
from fastgan.metrics.frechet import frechet_distances
from fastgan.metrics.kid import kernel_distance, mmd_influences, polynomial
from fastgan.metrics.options import FeatureOptions
from fastgan.metrics.prdc import memberships

METRICS = ("fid", "kid", "prdc")
RESAMPLES = 1000
LEVEL = 0.95
HIGHER_IS_BETTER = {"precision": True, "recall": True, "density": True, "coverage": True}
_OF_REFERENCE = frozenset(("recall", "coverage"))


@dataclass(frozen=True)
class Value:
    """One metric of one set.

    Attributes:
        value: the metric.
        low, high: the 95 % interval; None where the features are not at hand.
        p_next: the two-sided p-value of the difference to the next row; None in the last row.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p_next: float | None = None


@dataclass(frozen=True)
class Row:
    """One set: its name, number of images, and values by metric."""

    label: str
    n: int | None
    values: dict[str, Value]


@dataclass(frozen=True)
class Comparison:
    """The sets in the order of their first metric, best first; ``order`` holds the labels as they were given."""

    reference: Measured
    rows: list[Row]
    order: list[str]
    names: dict[str, str]
    identity: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A table for people: values to the precision of their intervals, and whether the next row differs."""
        header = ["set", "N", *self.names.values(), "next differs (p)"]
        first = next(iter(self.names))
        table = [header]
        for row in self.rows:
            p = row.values[first].p_next
            cells = [_rounded(row.values[key]) for key in self.names]
            table.append([row.label, "?" if row.n is None else str(row.n), *cells, "" if p is None else f"{p:.3g}"])
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        return [
            self.reference.describe(),
            *(
                "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in table
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: whole numbers, no rounding."""
        rows = [
            {
                "path": row.label,
                "n": row.n,
                "values": {self.names[key]: vars(value) for key, value in row.values.items()},
            }
            for row in self.rows
        ]
        against = {"path": self.reference.label, "n": self.reference.stats.n}
        return {"against": against, **self.identity, "level": LEVEL, "resamples": RESAMPLES, "sets": rows}

    def csv(self) -> str:
        """One row per set and metric."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["set", "n", "metric", "value", "low", "high", "p_next"])
        for row in self.rows:
            for key, found in row.values.items():
                writer.writerow([row.label, row.n, self.names[key], *vars(found).values()])
        return text.getvalue()

    def latex(self) -> str:
        """A ``tabular`` with one row per set."""
        lines = [rf"\begin{{tabular}}{{lr{'r' * len(self.names)}}}", r"\hline"]
        lines.append(" & ".join(["set", "$N$", *map(_escaped, self.names.values())]) + r" \\ \hline")
        for row in self.rows:
            cells = [_rounded(row.values[key], r" $\pm$ ") for key in self.names]
            lines.append(" & ".join([_escaped(row.label), str(row.n or "?"), *cells]) + r" \\")
        return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])

    def plot(self, path: Path) -> None:
        """Draw each metric with its intervals over the order in which the sets were given, such as checkpoints."""
        from matplotlib.figure import Figure

        check_plot_path(path)
        by_label = {row.label: row for row in self.rows}
        figure = Figure(figsize=(6, 2.2 * len(self.names) + 1), layout="constrained")
        for axes, (key, name) in zip(
            figure.subplots(len(self.names), squeeze=False)[:, 0], self.names.items(), strict=True
        ):
            found = [by_label[label].values[key] for label in self.order]
            values = [one.value for one in found]
            below = [one.value - (one.value if one.low is None else one.low) for one in found]
            above = [(one.value if one.high is None else one.high) - one.value for one in found]
            axes.errorbar(range(len(values)), values, yerr=[below, above], fmt="o-", capsize=3)
            axes.set(ylabel=name, xticks=range(len(values)))
            axes.set_xticklabels([Path(label).name for label in self.order], rotation=30, ha="right")
            axes.grid(alpha=0.3)
        with atomic_path(path) as temporary:
            figure.savefig(temporary)


def compare(
    sets: Sequence[Path],
    against: Path,
    options: FeatureOptions,
    *,
    metrics: Sequence[str] = ("fid",),
    subsets: int = 100,
    subset_size: int = 1000,
    k: int = 5,
    seed: int = 0,
    world: World | None = None,
) -> Comparison:
    """Measure each of ``sets`` against ``against``: images, files of statistics or features, or runs.

    Everything is checked before any feature is computed; the reference is read once, and so is each set.

    Args:
        metrics: of :data:`METRICS`; a set of statistics has fid alone, without an interval.
        subsets, subset_size, k: of KID and of precision and recall.
        seed: of the resamples and subsets.

    Raises:
        InputError: a path or an option cannot be used, or a metric needs features that a file does not hold.
    """
    world = world or World()
    if not metrics or not set(metrics) <= set(METRICS):
        raise InputError(f"--metrics must be of {', '.join(METRICS)} with --against, got {', '.join(metrics)}")
    with world.agreed():
        sources = [open_source(path, options) for path in (against, *sets)]
        for source in sources:
            if isinstance(source, Measured) and source.features is None and set(metrics) - {"fid"}:
                raise InputError(
                    f"--metrics {','.join(metrics)} needs images or features, {source.label} holds statistics"
                )
    (reference, *fakes), _ = measure_sources(
        sources, options, world, keep_features=[set(metrics) != {"fid"}] + [True] * len(sets)
    )
    distances = frechet_distances(reference.stats, [fake.stats for fake in fakes]).tolist()
    found: list[dict[str, tuple[float, Tensor | None]]] = []
    for fake, distance in zip(fakes, distances, strict=True):
        values: dict[str, tuple[float, Tensor | None]] = {}
        features, real = fake.features, reference.features
        if "fid" in metrics:
            known = None if features is None else distance_influences(features, fake.stats, reference.stats)
            values["fid"] = (distance, known)
        if "kid" in metrics and features is not None and real is not None:
            kid = kernel_distance(real, features, subsets=subsets, subset_size=subset_size, seed=seed)
            kernel = functools.partial(polynomial, degree=3, gamma=1 / real.shape[1], coef=1.0)
            values["kid"] = (kid.mean, mmd_influences(real, features, kernel, seed=seed))
        if "prdc" in metrics and features is not None and real is not None:
            values |= {name: (each.mean().item(), each) for name, each in memberships(real, features, k=k).items()}
        found.append(values)
    names = {key: _name(key, reference) for key in found[0]}
    first = next(iter(names))
    ranks = sorted(range(len(sets)), key=lambda i: found[i][first][0] * (-1 if HIGHER_IS_BETTER.get(first) else 1))
    rows = [
        Row(fakes[i].label, fakes[i].stats.n, _values(found[i], found[after] if after is not None else None, seed))
        for i, after in zip(ranks, [*ranks[1:], None], strict=True)
    ]
    stats = reference.stats
    identity = {key: getattr(stats, key) for key in ("backbone", "dim", "protocol", "precision")}
    return Comparison(reference, rows, [fake.label for fake in fakes], names, identity)


def resampled_means(contributions: Tensor, *, seed: int) -> Tensor:
    """Means of :data:`RESAMPLES` bootstrap samples of ``contributions`` (n,), less their own mean, float64."""
    rng = torch.Generator().manual_seed(seed)
    values = contributions.double().cpu()
    centred = values - values.mean()
    n = len(values)
    return torch.stack([centred[torch.randint(n, (n,), generator=rng)].mean() for _ in range(RESAMPLES)])


def _values(
    own: dict[str, tuple[float, Tensor | None]], after: dict[str, tuple[float, Tensor | None]] | None, seed: int
) -> dict[str, Value]:
    values = {}
    for key, (value, contributions) in own.items():
        if contributions is None:
            values[key] = Value(value)
            continue
        drawn = resampled_means(contributions, seed=seed)
        tail = (1 - LEVEL) / 2
        low, high = (value + drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))).tolist()
        p = None
        if after is not None and (other := after[key][1]) is not None:
            if key in _OF_REFERENCE:  # both of the same real images
                noise = resampled_means(contributions.double() - other.double(), seed=seed)
            else:
                noise = drawn - resampled_means(other, seed=seed + 1)
            beyond = (noise.abs() >= abs(value - after[key][0])).sum().item()
            p = (beyond + 1) / (RESAMPLES + 1)
        values[key] = Value(value, low if key == "kid" else max(low, 0.0), high, p)
    return values


def _name(key: str, reference: Measured) -> str:
    if key not in ("fid", "kid"):
        return key
    backbone = reference.stats.backbone or "unknown backbone"
    names = {"fid": ("FID", "FD"), "kid": ("KID", "KD")}[key]
    return names[0] if backbone == "inception" else f"{names[1]} ({backbone})"


def _rounded(found: Value, plus_minus: str = " +- ") -> str:
    """The value to two digits of its interval's half width."""
    if found.low is None or found.high is None:
        return f"{found.value:.4g}"
    half = (found.high - found.low) / 2
    digits = max(0, 1 - int(torch.tensor(half).log10().floor().item())) if half > 0 else 4
    return f"{found.value:.{digits}f}{plus_minus}{half:.{digits}f}"


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "_%&#$" else letter for letter in text)
