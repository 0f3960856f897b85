"""One definition of a benchmark for ``python -m bench`` and ``pytest bench --benchmark-only``.

A suite is a module ``bench_<suite>`` with ``workloads(quick, device)``, which yields :class:`Workload`. An
implementation is timed only after its result was found equal to the reference's.
"""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgan.files import write_text
from fastgan.timing import compare

SUITES = ("attention", "spectral_norm", "sqrtm", "fid")
SCHEMA = 1


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
    """

    name: str
    implementations: Mapping[str, Callable[[], Any]]
    reference: str
    check: Callable[[Any, Any], float]
    parameters: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-3
    floor: float | None = None
    once: bool = False


@dataclass(frozen=True)
class Record:
    """One implementation on one workload. Times in seconds; ``failure`` says why there are none."""

    suite: str
    workload: str
    implementation: str
    parameters: dict[str, Any]
    error: float | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    peak_memory: int | None = None
    launches: int | None = None
    floor: float | None = None
    failure: str | None = None


def load(suite: str, quick: bool, device: str) -> Iterator[Workload]:
    """The workloads of one suite."""
    return importlib.import_module(f"bench.bench_{suite}").workloads(quick, device)


def run(suite: str, workload: Workload, seconds: float) -> list[Record]:
    """Check every implementation against the reference, then time the right ones, interleaved."""
    names = [workload.reference, *(n for n in workload.implementations if n != workload.reference)]
    records, expected = {}, None
    for name in names:
        record, result = _check(suite, workload, name, expected)
        records[name] = record
        expected = result if name == workload.reference else expected
    if workload.once:
        return list(records.values())
    timed = {n: workload.implementations[n] for n in names if records[n].failure is None}
    timings = compare(timed, seconds=seconds, min_rounds=3, warmup=0) if timed else {}
    for name, timing in timings.items():
        memory, launches = _peak_memory(timed[name]), _launches(timed[name])
        values = asdict(timing) | {"peak_memory": memory, "launches": launches}
        records[name] = Record(**(asdict(records[name]) | values))
    return list(records.values())


def _check(suite: str, workload: Workload, name: str, expected: Any) -> tuple[Record, Any]:
    record = Record(suite, workload.name, name, workload.parameters, floor=workload.floor)
    start = time.perf_counter()
    try:
        result = workload.implementations[name]()
    except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Record(**(asdict(record) | {"failure": summary[:200]})), None
    if workload.once:
        seconds = time.perf_counter() - start
        record = Record(**(asdict(record) | {"median": seconds, "low": seconds, "high": seconds, "rounds": 1}))
    if name == workload.reference:
        return record, result
    if expected is None:
        return Record(**(asdict(record) | {"failure": "the reference failed"})), None
    found = workload.check(result, expected)
    failure = None if found <= workload.tolerance else f"wrong: relative error {found:.1e}"
    return Record(**(asdict(record) | {"error": found, "failure": failure})), result


def _peak_memory(implementation: Callable[[], Any]) -> int | None:
    """Bytes allocated on the GPU above what was there before; not known on a CPU."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    implementation()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _launches(implementation: Callable[[], Any]) -> int | None:
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        implementation()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def environment(device: str) -> dict[str, str]:
    """What the figures depend on: device, versions, revision of the code."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "scipy"):
        try:
            versions[package] = importlib.import_module(package).__version__
        except ImportError:
            versions[package] = "none"
    return {"device": name, "cuda": str(torch.version.cuda), **versions, "revision": _revision()}


def _revision() -> str:
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(records: list[Record], path: Path, device: str, quick: bool) -> None:
    """Write one run as JSON."""
    run_record = {
        "schema": SCHEMA,
        "environment": environment(device),
        "quick": quick,
        "records": [asdict(r) for r in records],
    }
    write_text(path, json.dumps(run_record, indent=1) + "\n")
