"""Fused attention: forward, backward and double backward; :mod:`fastgan.kernels.attention.launch` holds the launchers.

They are imported when first asked for: what a call may ask before, if its channels are supported, needs no Triton.
"""

import importlib
from typing import Any

_LAUNCHERS = ("attention_bwd", "attention_bwd_bwd", "attention_fwd", "empty_stats")


def __getattr__(name: str) -> Any:
    if name not in _LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fastgan.kernels.attention.launch"), name)
