"""Benchmarks: every claim measured against eager references, side by side in one process (``python -m bench``)."""
