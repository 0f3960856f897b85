"""Many sets of images against one reference: one pass each, confidence intervals, and which differences are noise.

Intervals come from a bootstrap over a set's images, to first order in each metric: the resampled quantity is the mean
of every image's influence on the metric (:mod:`fastgan.metrics.influences`), so that 1000 resamples need no second pass
and no second distance. The reference is held fixed, as it is common to all sets. An interval covers the metric's
expectation at this number of images, bias included, and not its limit at infinitely many.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan._files import atomic_path
from fastgan.distributed import World
from fastgan.metrics._fid_infinity import check_plot_path
from fastgan.metrics.catalog import EvaluateOptions, Found, Sets, unmet
from fastgan.metrics.evaluate import Choice, compute, head_of, open_source, printed, with_classes
from fastgan.metrics.evaluate import measure as measure_sources
from fastgan.metrics.features import Measured
from fastgan.metrics.options import FeatureOptions
from fastgan.metrics.results import SetResult, Value, result_dict

RESAMPLES = 1000
LEVEL = 0.95
_DRAWN = 1 << 20  # influences drawn at a time


@dataclass(frozen=True)
class Comparison:
    """The sets in the order of their first metric, best first; ``order`` holds the labels as they were given."""

    reference: Measured
    rows: list[SetResult]
    order: list[str]
    not_computed: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the numbers that every set has."""
        return list(self.rows[0].values)

    def lines(self) -> list[str]:
        """Return a table with values rounded to the precision of their intervals, and whether the next row differs."""
        header = ["set", "N", *self.names, "next differs (p)"]
        table = [header]
        for row in self.rows:
            n, p = row.measured.stats.n, row.values[self.names[0]].p_next
            cells = [row.values[name].text() for name in self.names]
            table.append([row.measured.label, "?" if n is None else str(n), *cells, "" if p is None else f"{p:.3g}"])
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        return [
            self.reference.describe(),
            *(
                "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in table
            ),
        ]

    def times(self) -> list[str]:
        """Return one line per set whose images were read, with the seconds of each stage."""
        sides = [self.reference, *(row.measured for row in self.rows)]
        return [f"{side.label}: {side.times.describe()}" for side in sides if side.times is not None]

    def as_dict(self) -> dict[str, Any]:
        """Return the object for JSON, in the shape of :mod:`fastgan.metrics.results`."""
        interval = {"level": LEVEL, "resamples": RESAMPLES}
        return result_dict(self.rows, self.reference, interval=interval, not_computed=self.not_computed)

    def finish(self) -> None:
        """Remove the checkpoints: to be called once the result is printed and written."""
        for side in (self.reference, *(row.measured for row in self.rows)):
            side.finish()

    def csv(self) -> str:
        """One row per set and metric."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["set", "n", "metric", "value", "low", "high", "p_next"])
        for row in self.rows:
            for name, found in row.values.items():
                numbers = [found.value, found.low, found.high, found.p_next]
                writer.writerow([row.measured.label, row.measured.stats.n, name, *numbers])
        return text.getvalue()

    def latex(self) -> str:
        """A ``tabular`` with one row per set."""
        lines = [rf"\begin{{tabular}}{{lr{'r' * len(self.names)}}}", r"\hline"]
        lines.append(" & ".join(["set", "$N$", *map(_escaped, self.names)]) + r" \\ \hline")
        for row in self.rows:
            cells = [row.values[name].text(r" $\pm$ ") for name in self.names]
            lines.append(" & ".join([_escaped(row.measured.label), str(row.measured.stats.n or "?"), *cells]) + r" \\")
        return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])

    def plot(self, path: Path) -> None:
        """Draw each metric with its intervals over the order in which the sets were given, such as checkpoints."""
        from matplotlib.figure import Figure

        check_plot_path(path)
        by_label = {row.measured.label: row for row in self.rows}
        figure = Figure(figsize=(6, 2.2 * len(self.names) + 1), layout="constrained")
        for axes, name in zip(figure.subplots(len(self.names), squeeze=False)[:, 0], self.names, strict=True):
            found = [by_label[label].values[name] for label in self.order]
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
    what: EvaluateOptions | None = None,
    *,
    floor: Path | None = None,
    world: World | None = None,
) -> Comparison:
    """Measure each of ``sets`` against ``against``: images, files of statistics or features, or runs.

    Everything is checked before any feature is computed; the reference is read once, and so is each set.

    Args:
        what: the metrics and their parameters. A set of statistics has the distance alone, without an interval.
        floor: real images that were not trained on, for metrics that need them.

    Raises:
        InputError: a path or an option cannot be used, or a metric needs what a file does not hold.
    """
    world, what = world or World(), what or EvaluateOptions()
    choice = Choice(what, options, world)
    with world.agreed():
        real, *fakes = (open_source(path, options) for path in (against, *sets))
        test = None if floor is None else open_source(floor, options)
        for metric in what.metrics:
            for fake in fakes:
                choice.leave_out(metric, unmet(metric, what, fake, real, test))
    sources = [real, *fakes, *([] if test is None else [test])]
    kept = [choice.needs("real"), *[True] * len(sets), *([] if test is None else [choice.needs("test")])]
    sides, network = measure_sources(sources, options, world, keep_features=kept, choice=choice, fakes=fakes)
    if "intra-fid" in choice.metrics:
        sides = [with_classes(side, source) for side, source in zip(sides, sources, strict=True)]
    reference, measured = sides[0], sides[1 : len(sets) + 1]
    reference.stats.root()  # once for all sets
    test_side = sides[-1] if test is not None else None
    compared = [Sets(each, reference, test_side, head_of(network)) for each in measured]
    found = [[number for _, number in of_set] for of_set in compute(choice, compared)]
    first = [numbers[0] for numbers in found]
    ranks = sorted(range(len(sets)), key=lambda i: -first[i].value if first[i].higher_is_better else first[i].value)
    noise = [[resampled(one, seed=what.seed + i) for one in row] for i, row in enumerate(found)]
    rows = []
    for i, after in zip(ranks, [*ranks[1:], None], strict=True):
        values = {}
        for place, one in enumerate(found[i]):
            p = None
            if after is not None:
                p = difference_p(one.value - found[after][place].value, noise[i][place], noise[after][place])
            low, high = interval(one, noise[i][place])
            values[one.name] = Value(one.value, low, high, p, **printed(one))
        rows.append(SetResult(measured[i], values))
    return Comparison(reference, rows, [fake.label for fake in measured], choice.left_out)


def resampled(found: Found, *, seed: int) -> Tensor | None:
    """Return the changes of a number in :data:`RESAMPLES` bootstrap samples, float64 of mean about 0.

    None if they are not known.

    The metric's own random draws, such as KID's subsets, add their noise.
    """
    generator = torch.Generator().manual_seed(seed)
    influences = None if found.influences is None else found.influences()
    if influences is None and (found.influences is not None or found.standard_error == 0):
        return None
    noise = torch.randn(RESAMPLES, generator=generator, dtype=torch.float64) * found.standard_error
    if influences is not None:
        values, n = influences.double().cpu(), len(influences)
        counts = torch.arange(RESAMPLES).split(max(1, _DRAWN // n))
        noise += torch.cat([values[torch.randint(n, (len(part), n), generator=generator)].mean(1) for part in counts])
    return noise


def interval(found: Found, noise: Tensor | None) -> tuple[float | None, float | None]:
    """Return the bounds of the :data:`LEVEL` interval around a number, not below the metric's least value."""
    if noise is None:
        return None, None
    tail = (1 - LEVEL) / 2
    low, high = (found.value + noise.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))).tolist()
    return (low if found.least is None else max(low, found.least)), high


def difference_p(difference: float, noise: Tensor | None, other: Tensor | None) -> float | None:
    """Return the two-sided p-value of the difference between two sets' numbers; their images are independent."""
    if noise is None or other is None:
        return None
    beyond = ((noise - other).abs() >= abs(difference)).sum().item()
    return (beyond + 1) / (RESAMPLES + 1)


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "_%&#$" else letter for letter in text)
