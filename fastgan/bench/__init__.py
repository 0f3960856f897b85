"""Time implementations of the same work against each other, and keep the records."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch's profiler starts, which is talkative

from fastgan.bench.harness import (
    Workload,
    check_all,
    largest_relative_norm,
    relative_difference,
    relative_norm,
    run,
)
from fastgan.bench.records import Record, RecordError, Run, environment, read_run, write_run
from fastgan.bench.timing import Timing, time_interleaved

__all__ = [
    "Record",
    "RecordError",
    "Run",
    "Timing",
    "Workload",
    "check_all",
    "environment",
    "largest_relative_norm",
    "read_run",
    "relative_difference",
    "relative_norm",
    "run",
    "time_interleaved",
    "write_run",
]
