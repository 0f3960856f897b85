"""Workloads done by several implementations, whose results are compared before any of them is timed.

Each function that returns an error can be a workload's ``check``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastgan.backend import release_memory
from fastgan.bench.records import Record
from fastgan.bench.timing import time_interleaved

CACHE_FLUSH_BYTES = 256 << 20
LONG = 2.0
"""Seconds of a call above which the profiler is not run over it: for launches, and on a CPU for memory."""


@dataclass(frozen=True)
class Workload:
    """The same work done by several implementations.

    Args:
        name: unique within its suite.
        implementations: name to callable; each call does the whole work and returns its result.
        reference: the implementation whose result counts as right; it runs first and is timed with the others.
        check: (result, result of the reference) -> relative error.
        parameters: sizes and dtype, for the records.
        tolerance: an implementation with a larger error is not timed.
        floor: seconds below which this device cannot do the work, if known.
        once: time the checked run itself, for long work.
        once_above: the same, for implementations that take more than this many seconds.
        images: real images per call, for images per second.
        cold: on a GPU, overwrite the second-level cache before each timed call, for memory-bound work whose operands
            come from device memory in a real step.
        warmup: untimed calls of each implementation after the checked one.
        min_rounds: least number of timed calls of each.

    Example:
        >>> x = torch.randn(100)
        >>> ways = {"numpy": lambda: float(x.numpy().sum()), "torch": lambda: x.sum()}
        >>> work = Workload("sum", ways, reference="numpy", check=relative_difference)
        >>> [record.implementation for record in run("mine", work, seconds=0.01, device="cpu")]
        ['numpy', 'torch']
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


def run(suite: str, workload: Workload, seconds: float, device: str | None = None) -> list[Record]:
    """Check every implementation against the reference, then time the right ones, interleaved.

    Args:
        suite: the suite's name, for the records.
        workload: the work to measure.
        seconds: about how long to time the workload, all implementations together.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.

    Example:
        >>> work = Workload("one", {"a": lambda: 1.0, "b": lambda: 1.0}, reference="a", check=relative_difference)
        >>> [record.error for record in run("mine", work, seconds=0.01, device="cpu")]
        [None, 0.0]
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    records = check_all(suite, workload, device)
    right = {n: workload.implementations[n] for n, r in records.items() if r.failure is None and r.median is None}
    if not right:
        return list(records.values())
    try:
        timings = time_interleaved(
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
    """Call each implementation once; its record has a ``failure`` if it raised or differs from the reference.

    The reference's record is the first. If the reference needs a package that is not installed, the next
    implementation takes its place.

    Example:
        >>> work = Workload("one", {"a": lambda: 1.0, "b": lambda: 2.0}, reference="a", check=relative_difference)
        >>> check_all("mine", work, "cpu")["b"].failure
        'wrong: relative error 1.0e+00'
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
    """Return the record, without times, and the result or the exception raised instead."""
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
    """Measure peak memory and kernel launches of one call that takes about ``seconds``; None if unknown."""
    profiled = seconds < LONG
    return {
        "peak_memory": peak_memory(implementation, device) if profiled or device == "cuda" else None,
        "launches": _launches(implementation) if profiled and device == "cuda" else None,
    }


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Return the peak of torch's allocator during the call, in bytes above its level before; None if unchanged.

    Memory that SciPy and LAPACK take for themselves is not counted.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before or None
    release_memory()  # what the extension used again would not be counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:  # a CPU's allocator keeps no peak
        result = call()
    del result
    alive = peak = 0
    memory = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(memory, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak or None


def _launches(implementation: Callable[[], Any]) -> int | None:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        implementation()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [e for e in recorded.key_averages() if e.device_type == on_device and not e.is_user_annotation]
    return sum(e.count for e in events) or None  # none if the profiler cannot see the GPU


def flush_cache() -> None:
    """Overwrite the GPU's second-level cache."""
    torch.empty(CACHE_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()


def wait(device: str) -> None:
    """Wait until the GPU has finished its work; return at once on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def relative_norm(result: Tensor, reference: Tensor) -> float:
    """|result - reference| / |reference| in the Frobenius norm, computed in float64.

    Example:
        >>> relative_norm(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
        0.5
    """
    b = reference.detach().double()
    a = result.detach().to(b.device).double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def largest_relative_norm(results: Sequence[Tensor | None], references: Sequence[Tensor | None]) -> float:
    """Return the largest :func:`relative_norm` of a pair; pairs with a zero or None as reference are left out.

    Example:
        >>> largest_relative_norm([torch.tensor([2.0]), None], [torch.tensor([1.0]), None])
        1.0
    """
    pairs = [(a, b) for a, b in zip(results, references, strict=True) if b is not None and bool(b.count_nonzero())]
    return max(math.inf if a is None else relative_norm(a, b) for a, b in pairs)


def relative_difference(result: Tensor | float, reference: Tensor | float) -> float:
    """Return the largest relative difference of an entry.

    Example:
        >>> relative_difference(3.0, 2.0)
        0.5
    """
    b = torch.as_tensor(reference).detach().double()
    a = torch.as_tensor(result).detach().to(b.device).double()
    return ((a - b).abs() / b.abs()).max().item()
