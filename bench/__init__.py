"""Benchmarks: every claim is measured against eager references in one process (``python -m bench``)."""
