"""Most bytes that torch holds at once during a call, above what it held before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes of torch's allocator on ``device``; memory that SciPy and LAPACK take for themselves is not in it.

    Returns None where nothing was allocated through torch.
    """
    peak = _on_gpu(call) if device == "cuda" else _on_cpu(call)
    return peak or None


def _on_gpu(call: Callable[[], Any]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(call: Callable[[], Any]) -> int:
    """From the profiler's log of allocations, as the CPU's allocator keeps no statistics."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    alive = peak = 0
    memory = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(memory, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
