"""The lines of a run that the documents show: fastgan, and every baseline that can do the same work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgan.bench.records import Record, RecordError, Run, read_run

SELECTED = {
    "attention": r"^block (backward|penalty), C=(128 H=32|64 H=64) ",
    "fid": r"^(inception|class_distances|command|resident)",
    "spectral_norm": r"critic, forward\+backward",
    "sqrtm": r"(full_rank|unrelated|rank_deficient|one_against_\d+|classes)-(256|2048)$|pairs-32$|^sqrtm",
    "train_step": r"discriminator$",
}
"""Workloads in the summary of a device, by suite. A suite without an entry shows all of its workloads."""


@dataclass(frozen=True)
class Highlight:
    """One row of README's tables.

    Args:
        use: "layers", "steps" or "evaluation".
        suite: its suite.
        workload: pattern of its name.
        label: name of the row in the table.
        against: the implementation that most people use.
        pictured: whether README's picture has a bar for it.
    """

    use: str
    suite: str
    workload: str
    label: str
    against: str
    pictured: bool = True


HIGHLIGHTS = (
    Highlight(
        "layers", "attention", r"^block penalty, C=64 H=64 ", "gradient penalty through attention, 64x64", "eager"
    ),
    Highlight(
        "layers", "attention", r"^block backward, C=128 H=32 ", "attention and its gradient, 32x32", "eager", False
    ),
    Highlight(
        "layers",
        "spectral_norm",
        r"^biggan-128 critic, forward\+backward",
        "spectral norms, BigGAN-128 critic",
        "torch",
    ),
    Highlight(
        "layers",
        "spectral_norm",
        r"^sngan-32 critic, forward\+backward",
        "spectral norms, SNGAN-32 critic",
        "torch",
        False,
    ),
    Highlight("steps", "train_step", r"^sagan 128x128, disc", "SAGAN 128x128, critic's update", "torch layers, eager"),
    Highlight(
        "steps", "train_step", r"^wgan-gp 32x32, grad.* disc", "WGAN-GP 32x32, critic's update", "torch layers, eager"
    ),
    Highlight(
        "steps", "train_step", r"^dcgan 32x32, disc", "DCGAN 32x32, critic's update", "torch layers, eager", False
    ),
    Highlight("evaluation", "fid", r"^command", "FID of 2000 images, whole command", "python -m pytorch_fid"),
    Highlight("evaluation", "fid", r"^inception-fp32", "Inception features of 16 images", "pytorch-fid", False),
    Highlight("evaluation", "sqrtm", r"unrelated-2048", "FID's matrix square root, 2048x2048", "scipy.linalg.sqrtm"),
)
"""Rows of README's tables, in order. Rows without a record on a device are left out."""
DEFAULTS = ("fastgan", "fastgan auto")
"""Implementations that a user gets by default. They are shown and ratios refer to them, even if another is faster."""
BY_NAME = ("fastgan extension", "fastgan reference")
"""Implementations that the default chooses from. Only the full tables show them."""


@dataclass(frozen=True)
class Line:
    """One workload.

    Args:
        suite: its suite.
        workload: its name.
        own: fastgan's default, or the fastest of its implementations if there is no default.
        fastest: the fastest of fastgan's implementations, which may be ``own``.
        baselines: the others that were timed, the fastest first.
    """

    suite: str
    workload: str
    own: Record
    fastest: Record
    baselines: tuple[Record, ...]


def times(slower: Record, faster: Record) -> float:
    """Return the median of ``slower`` divided by that of ``faster``."""
    return seconds(slower) / seconds(faster)


def seconds(record: Record) -> float:
    """The median of a record that was timed."""
    if record.median is None:
        raise RecordError(f"{record.workload} / {record.implementation} was not timed: {record.failure}")
    return record.median


def read_runs(folder: Path) -> dict[str, Run]:
    """Read the runs of one device by suite: the full run, or the quick one if there is no other."""
    runs: dict[str, Run] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem.endswith("-quick")):
        runs.setdefault(path.stem.removesuffix("-quick"), read_run(path))
    return dict(sorted(runs.items()))


def lines(suite: str, run: Run) -> list[Line]:
    """The selected workloads of a run in which fastgan and something else were timed."""
    workloads = run.workloads()
    selected = {name: found for name, found in workloads.items() if re.search(SELECTED.get(suite, ""), name)}
    lines = (_line(suite, name, found) for name, found in (selected or workloads).items())
    return [line for line in lines if line]


def highlights(runs: dict[str, Run]) -> list[tuple[Highlight, Line]]:
    """The rows of README's tables that a device has records of."""
    found = []
    for highlight in HIGHLIGHTS:
        workloads = runs[highlight.suite].workloads() if highlight.suite in runs else {}
        names = [name for name in workloads if re.search(highlight.workload, name)]
        lines = [_line(highlight.suite, name, workloads[name]) for name in names[:1]]
        found += [(highlight, line) for line in lines if line]
    return found


def bars(runs: dict[str, Run]) -> list[tuple[str, str, float]]:
    """Label, other implementation and its time over fastgan's, for README's picture, the largest first."""
    found = [
        (highlight.label, _plainly(record.implementation), times(record, line.own))
        for highlight, line in highlights(runs)
        for record in line.baselines
        if highlight.pictured and record.implementation == highlight.against
    ]
    return sorted(found, key=lambda bar: -bar[2])


def _plainly(implementation: str) -> str:
    names = {"eager": "eager PyTorch", "torch": "PyTorch", "torch layers, eager": "eager PyTorch"}
    return names.get(implementation, implementation.removeprefix("python -m ").replace("_", "-"))


def _line(suite: str, workload: str, records: Sequence[Record]) -> Line | None:
    timed = sorted((r for r in records if r.median is not None), key=seconds)
    timed = [r for r in timed if r.implementation not in BY_NAME]
    own = [r for r in timed if r.own and r is not records[0]]
    baselines = tuple(r for r in timed if r not in own)
    if not own or not baselines:
        return None
    default = next((r for r in own if r.implementation in DEFAULTS), own[0])
    return Line(suite, workload, default, own[0], baselines)
