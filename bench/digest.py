"""The lines of a run that the README shows: fastgan, and every baseline that can do the same work."""

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
"""Workloads that the README shows of a suite, if it has any of them; all of the others."""
DEFAULTS = ("fastgan", "fastgan auto")
"""Implementations that a user gets by default. They are shown and ratios refer to them, even if another is faster."""
BY_NAME = ("fastgan extension", "fastgan reference")
"""Implementations that the default chooses from. They stand in the full tables alone."""


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


def _line(suite: str, workload: str, records: Sequence[Record]) -> Line | None:
    timed = sorted((r for r in records if r.median is not None), key=seconds)
    timed = [r for r in timed if r.implementation not in BY_NAME]
    own = [r for r in timed if r.own and r is not records[0]]
    baselines = tuple(r for r in timed if r not in own)
    if not own or not baselines:
        return None
    default = next((r for r in own if r.implementation in DEFAULTS), own[0])
    return Line(suite, workload, default, own[0], baselines)
