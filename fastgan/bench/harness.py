"""One definition of a benchmark for ``python -m bench`` and ``pytest bench --benchmark-only``.

A suite is a module ``bench_<suite>`` with ``workloads(quick, device)``, which yields :class:`Workload`. An
implementation is timed only after its result was found equal to the reference's.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.peak_memory import peak_memory
from fastgan.bench.records import Record, environment
from fastgan.bench.timing import compare

__all__ = ["SUITES", "Record", "Workload", "check_all", "environment", "flush_cache", "load", "measure", "run", "wait"]

SUITES = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))
CACHE_FLUSH_BYTES = 256 << 20
LONG = 2.0
"""Seconds of a call above which the profiler is not run over it: for launches, and on a CPU for memory."""


@dataclass(frozen=True)
class Workload:
    """The same work done by several implementations.

    Args:
        name: unique within its suite.
        implementations: name to callable; each call does the whole work and returns its result.
        reference: the implementation whose result is right; run first, and timed with the others.
        check: (result, result of the reference) -> relative error.
        parameters: what was asked for: sizes, dtype.
        tolerance: an implementation with a larger error is not timed.
        floor: seconds below which this device cannot do the work, where known.
        once: a run takes so long that the one that is checked is also the one that is timed.
        once_above: the same for an implementation that takes more than these seconds.
        images: real images that one call consumes; images per second are reported.
        cold: on a GPU the second-level cache is overwritten before each timed call, as for work that is bound by
            memory and whose operands come from there in a real step.
        warmup: untimed calls of each implementation after the one that is checked.
        min_rounds: the least number of timed calls of each.
    """

    name: str
    implementations: Mapping[str, Callable[[], Any]]
    reference: str
    check: Callable[[Any, Any], float]
    parameters: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-3
    floor: float | None = None
    once: bool = False
    once_above: float = math.inf
    images: int | None = None
    cold: bool = False
    warmup: int = 1
    min_rounds: int = 3

    @property
    def order(self) -> list[str]:
        """Names of the implementations, the reference first."""
        return [self.reference, *(name for name in self.implementations if name != self.reference)]


def load(suite: str, quick: bool, device: str) -> Iterable[Workload]:
    """The workloads of one suite."""
    return importlib.import_module(f"bench.bench_{suite}").workloads(quick, device)


def run(suite: str, workload: Workload, seconds: float, device: str | None = None) -> list[Record]:
    """Check every implementation against the reference, then time the right ones, interleaved.

    Args:
        suite: the suite's name, for the records.
        workload: what to measure.
        seconds: about how long to time the workload, all implementations together.
        device: ``cpu`` or ``cuda``, where the work is done; a GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    records = check_all(suite, workload, device)
    right = {n: workload.implementations[n] for n, r in records.items() if r.failure is None and r.median is None}
    if not right:
        return list(records.values())
    try:
        timings = compare(
            right,
            seconds=seconds,
            min_rounds=workload.min_rounds,
            warmup=workload.warmup,
            device=device,
            prepare=flush_cache if workload.cold and device == "cuda" else None,
        )
    except Exception as error:  # such as a GPU's memory that runs out: the suite goes on with the next workload
        failure = f"not timed: {_first_line(error)}"
        return [replace(r, failure=failure) if name in right else r for name, r in records.items()]
    for name, timing in timings.items():
        records[name] = replace(records[name], **asdict(timing), **measure(right[name], timing.median, device))
    return list(records.values())


def check_all(suite: str, workload: Workload, device: str) -> dict[str, Record]:
    """One call of each implementation; a record has a ``failure`` where it raised or differs from the reference.

    The reference's record is the first. Where the reference is of a package that is not installed, the next
    implementation takes its place.
    """
    torch._dynamo.reset()  # past its limit of recompilations a function runs eagerly, and would be timed so
    records: dict[str, Record] = {}
    absent: dict[str, Record] = {}
    expected: Any = None
    for name in workload.order:
        record, result = _check(suite, workload, name, expected, device, is_reference=not records)
        if not records and isinstance(result, ModuleNotFoundError):
            absent[name] = record
            continue
        if not records:
            expected = result
        records[name] = record
    return records | absent


def _check(
    suite: str, workload: Workload, name: str, expected: Any, device: str, *, is_reference: bool
) -> tuple[Record, Any]:
    """The record, without times, and the result or what was raised in its place."""
    record = Record(suite, workload.name, name, workload.parameters, floor=workload.floor, images=workload.images)
    if isinstance(expected, Exception):
        return replace(record, failure="the reference failed"), expected
    start = time.perf_counter()
    try:
        result = workload.implementations[name]()
        wait(device)
        elapsed = time.perf_counter() - start
        error = None if is_reference else workload.check(result, expected)
    except Exception as failure:  # whatever an implementation raises is a result of this benchmark
        return replace(record, failure=_first_line(failure)), failure
    if error is not None and not error <= workload.tolerance:
        finite = error if math.isfinite(error) else None
        return replace(record, error=finite, failure=f"wrong: relative error {error:.1e}"), result
    record = replace(record, error=error, first_call=elapsed)
    if workload.once or elapsed > workload.once_above:
        record = replace(record, median=elapsed, low=elapsed, high=elapsed, rounds=1)
    return record, result


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def measure(implementation: Callable[[], Any], seconds: float, device: str) -> dict[str, Any]:
    """Peak memory and kernel launches of one call that takes about ``seconds``; None where they are not known."""
    profiled = seconds < LONG
    return {
        "peak_memory": peak_memory(implementation, device) if profiled or device == "cuda" else None,
        "launches": _launches(implementation) if profiled and device == "cuda" else None,
    }


def _launches(implementation: Callable[[], Any]) -> int | None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        implementation()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [e for e in profile.key_averages() if e.device_type == on_device and not e.is_user_annotation]
    return sum(e.count for e in events) or None  # none where the profiler cannot see the GPU


def flush_cache() -> None:
    """Overwrite the GPU's second-level cache."""
    torch.empty(CACHE_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()


def wait(device: str) -> None:
    """Until the GPU has done what was asked of it; at once on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
