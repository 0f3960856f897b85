"""The lines of a run that the README shows: fastgan, the reference and the fastest other implementation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.records import Record, RecordError, Run, read_run

SELECTED = {"attention": r"^block (backward|penalty)", "spectral_norm": r"forward\+backward"}
"""Workloads of a suite that the README shows; all of the others."""
OWN = "fastgan"


@dataclass(frozen=True)
class Line:
    """One workload: the fastest of fastgan's implementations, the reference, and the fastest of the others, if any."""

    suite: str
    workload: str
    own: Record
    reference: Record
    other: Record | None

    @property
    def speedup(self) -> float:
        """Median time of the reference over fastgan's."""
        return times(self.reference, self.own)


def times(slower: Record, faster: Record) -> float:
    """How many times as long the median of ``slower`` is."""
    return seconds(slower) / seconds(faster)


def seconds(record: Record) -> float:
    """The median of a record that was timed."""
    if record.median is None:
        raise RecordError(f"{record.workload} / {record.implementation} was not timed: {record.failure}")
    return record.median


def read_runs(folder: Path) -> dict[str, Run]:
    """The runs of one device by suite: the full one, or the quick one where there is no other."""
    runs: dict[str, Run] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem.endswith("-quick")):
        runs.setdefault(path.stem.removesuffix("-quick"), read_run(path))
    return dict(sorted(runs.items()))


def lines(suite: str, run: Run) -> list[Line]:
    """The selected workloads of a run in which fastgan was timed."""
    pattern = SELECTED.get(suite, "")
    found = (_line(suite, name, records) for name, records in run.workloads().items() if re.search(pattern, name))
    return [line for line in found if line]


def _line(suite: str, workload: str, records: Sequence[Record]) -> Line | None:
    reference, *others = records
    if reference.median is None:
        return None
    own = _fastest(r for r in others if r.implementation.startswith(OWN))
    if own is None:
        return None
    other = _fastest(r for r in others if not r.implementation.startswith(OWN))
    return Line(suite, workload, own, reference, other)


def _fastest(records: Iterable[Record]) -> Record | None:
    return min((r for r in records if r.median is not None), key=seconds, default=None)
