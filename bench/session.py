"""One ``python -m bench``: runs suites in turn, prints a table per workload, writes a file per suite.

A suite is a module ``bench_<suite>`` with ``workloads(quick, device)``, which yields workloads.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from bench import limits
from fastgan.bench import Record, Run, Workload, environment, run, write_run

SUITES = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))
DISPENSABLE = ("20 %", "80 %", "first call", "error", "images/s")
"""Columns that a narrow console goes without, in this order; the JSON file has their values."""


def load(suite: str, quick: bool, device: str) -> Iterable[Workload]:
    """Return the workloads of one of :data:`SUITES`."""
    return importlib.import_module(f"bench.bench_{suite}").workloads(quick, device)


@dataclass
class Session:
    """Run suites and write their files.

    Args:
        folder: of the JSON files.
        quick: small sizes.
        device: ``cpu`` or ``cuda``.
        seconds: about how long to time each workload.
        limit: no workload is begun after this many seconds.
        baseline: the implementation that ratios are against; None for the reference of each workload.
        only: run the implementations alone whose name contains one of these; empty for all.
        without: leave out the implementations whose name contains one of these. The reference always runs.
    """

    folder: Path
    quick: bool
    device: str
    seconds: float
    limit: float = math.inf
    baseline: str | None = None
    only: Sequence[str] = ()
    without: Sequence[str] = ()
    console: Console = field(default_factory=Console)
    environment: dict[str, str] = field(init=False)
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.environment = environment(self.device)
        if self.device == "cpu":
            self.environment["limits"] = limits.description()
        self.start = time.perf_counter()

    def run_suite(self, suite: str) -> list[str]:
        """Run a suite and write its file; a line for every reference or fastgan implementation that failed.

        The file is written after each workload, so an interrupted run keeps its measurements.
        """
        start = time.perf_counter()
        path = self.folder / f"{suite}{'-quick' if self.quick else ''}.json"
        records: list[Record] = []
        for workload in map(self._chosen, load(suite, self.quick, self.device)):
            if len(workload.implementations) == 1 and (self.only or self.without):
                continue
            if time.perf_counter() - self.start > self.limit:
                self.console.print(f"{suite}: left out after {self.limit:.0f} s: {workload.name}", highlight=False)
                continue
            with self.console.status(f"{suite}: {workload.name}"):
                found = run(suite, workload, self.seconds, self.device)
            self._print(found)
            records += found
            write_run(Run(self.environment, self.quick, tuple(records)), path)
        written = path if records else "nothing was measured"
        self.console.print(f"{suite}: {written} ({time.perf_counter() - start:.0f} s)", highlight=False)
        return [f"{r.suite} / {r.workload} / {r.implementation}: {r.failure}" for r in _failed(records)]

    def _chosen(self, workload: Workload) -> Workload:
        """The workload with the reference and the implementations that are asked for."""

        def is_chosen(name: str) -> bool:
            is_wanted = not self.only or any(part in name for part in self.only)
            return name == workload.reference or (is_wanted and not any(part in name for part in self.without))

        return replace(workload, implementations={n: f for n, f in workload.implementations.items() if is_chosen(n)})

    def _print(self, records: list[Record]) -> None:
        self.console.print(_table(records, self.baseline, self.console))
        for record in records:
            if record.failure:
                self.console.print(f"  {record.implementation}: {record.failure}", style="dim", highlight=False)


def _failed(records: list[Record]) -> list[Record]:
    """References and implementations of fastgan's that failed, but for want of a package."""
    references: dict[str, Record] = {}
    for record in records:
        references.setdefault(record.workload, record)
    failed = [r for r in records if r.failure and not r.failure.startswith("No module named")]
    return [r for r in failed if r.own or r is references[r.workload]]


def _table(records: list[Record], baseline: str | None, console: Console) -> Table:
    """Make a table of the columns with values, without the DISPENSABLE ones that do not fit the console."""
    against = next((r for r in records if r.implementation == baseline), None) if baseline else records[0]
    columns = {
        "median": lambda r: _time(r.median),
        "20 %": lambda r: _time(r.low),
        "80 %": lambda r: _time(r.high),
        f"times {baseline or 'reference'}": lambda r: (
            f"{against.median / r.median:.2f}" if against and against.median else ""
        ),
        "error": lambda r: "" if r.error is None else f"{r.error:.1e}",
        "first call": lambda r: _time(r.first_call),
        "memory": lambda r: "" if r.peak_memory is None else f"{r.peak_memory / 1e6:.1f} MB",
        "launches": lambda r: "" if r.launches is None else str(r.launches),
        "times floor": lambda r: "" if r.floor is None else f"{r.median / r.floor:.2f}",
        "images/s": lambda r: "" if r.images is None else f"{r.images / r.median:.1f}",
    }
    timed = [r for r in records if r.median]
    used = {name: cell for name, cell in columns.items() if any(cell(r) for r in timed)}

    def with_columns() -> Table:
        table = Table("implementation", *used, title=records[0].workload)
        for r in records:
            table.add_row(r.implementation, *((cell(r) for cell in used.values()) if r.median else ("-",)))
        return table

    for name in DISPENSABLE:
        if Measurement.get(console, console.options.update(max_width=1000), with_columns()).maximum <= console.width:
            break
        used.pop(name, None)
    return with_columns()


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1e3 * seconds:.2f} ms"
