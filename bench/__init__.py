"""Benchmarks: every claim measured against eager references, side by side in one process. See ``python -m bench --help``."""
