"""Paired timing: all implementations of one workload in one process, interleaved, so that drift hits them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds: the median and the 20 % and 80 % quantiles of ``rounds`` runs.

    Example:
        >>> Timing(median=0.5, low=0.4, high=0.6, rounds=5).median
        0.5
    """

    median: float
    low: float
    high: float
    rounds: int


def time_interleaved(
    implementations: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    warmup: int = 1,
    device: str | None = None,
    prepare: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time callables in turn, round after round, each round in an order of its own.

    What an implementation leaves in caches and in the allocator makes the next one faster or slower, so none may always
    follow the same other one. The orders are the same in each run.

    Args:
        implementations: name to callable; each call does the whole work.
        seconds: stop after about this much measured time, once ``min_rounds`` rounds are done.
        min_rounds: the least number of rounds.
        warmup: untimed calls of each implementation first.
        device: ``cuda`` times with events on the current stream, ``cpu`` with the clock; by default a GPU if there is
            one.
        prepare: called before each timed call, outside its time.

    Example:
        >>> timings = time_interleaved({"a": lambda: sum(range(100))}, seconds=0.01, device="cpu")
        >>> timings["a"].rounds >= 5
        True
    """
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    for run in implementations.values():
        for _ in range(warmup):
            run()
    samples: dict[str, list[float]] = {name: [] for name in implementations}
    order, rng = list(implementations.items()), random.Random(0)
    spent = 0.0
    while spent < seconds or len(next(iter(samples.values()))) < min_rounds:
        rng.shuffle(order)
        for name, run in order:
            if prepare:
                prepare()
            elapsed = _time_once(run, on_gpu)
            samples[name].append(elapsed)
            spent += elapsed
    return {name: _summary(times) for name, times in samples.items()}


def _time_once(run: Callable[[], object], on_gpu: bool) -> float:
    if not on_gpu:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def _summary(times: list[float]) -> Timing:
    if len(times) < 2:
        return Timing(times[0], times[0], times[0], len(times))
    quintiles = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), quintiles[0], quintiles[3], len(times))
