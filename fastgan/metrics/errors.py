"""The exception of fastgan.metrics that the command line turns into a single line."""

from fastgan.errors import InputError

__all__ = ["InputError"]
