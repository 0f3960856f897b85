"""Benchmarks: every claim measured against eager references, side by side in one process (``python -m bench``)."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch's profiler starts, which is talkative
