"""Seconds that each stage of a pass over images takes, and so which of them is the bound."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

STAGES = ("decode", "waiting", "resize", "network", "statistics")


class StageTimes:
    """Wall-clock seconds per stage of one pass.

    Threads decode while the main thread resizes, runs the network and adds to the statistics, so ``decode`` is the sum
    over threads and overlaps the others; ``waiting`` is how long the main thread had no images. A GPU works
    asynchronously: its time appears where the features are first needed, in ``statistics``.

    Attributes:
        seconds: by stage.
        threads: number of threads that decode; 0 if the main thread does.

    >>> times = StageTimes()
    >>> with times.measure("network"):
    ...     _ = sum(range(10))
    >>> times.bound
    'network'
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.threads = 0
        self._lock = Lock()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to ``stage``; safe in threads."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            with self._lock:
                self.seconds[stage] += took

    @property
    def bound(self) -> str:
        """The stage that the pass waits for most: ``decode`` if the main thread mostly waits for images."""
        main = {stage: self.seconds[stage] for stage in STAGES if stage != "decode"}
        longest = max(main, key=lambda stage: main[stage])
        return "decode" if longest == "waiting" else longest

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {**self.seconds, "threads": self.threads, "bound": self.bound}

    def describe(self) -> str:
        """Return one line for people."""
        parts = ", ".join(f"{stage} {self.seconds[stage]:.2f} s" for stage in STAGES if stage != "decode")
        return f"{parts}; {self.threads} threads decoded for {self.seconds['decode']:.2f} s; bound: {self.bound}"
