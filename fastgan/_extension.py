"""Load the C++/CUDA extension ``fastgan/_C*.so`` once, and know why when it cannot be loaded."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from fastgan.backend import Backend, warn_once


@functools.cache
def _load() -> str:
    """Load the extension; return '' on success, else the reason why there is none."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return "not built: reinstall with `pip install --no-build-isolation .` where a C++ compiler is at hand"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"{found[0].name} does not load: {error}"
    return ""


def available(device_type: str = "cpu") -> bool:
    """True where the extension's half for ``device_type`` ("cpu" or "cuda") is loaded. The first no warns once."""
    missing = _missing(device_type)
    if missing:
        warn_once(f"fastgan runs its Python path in place of the C++ extension ({device_type}): {missing}")
    return not missing


def _missing(device_type: str) -> str:
    reason = _load()
    if reason:
        return reason
    if device_type == "cuda" and not torch.ops.fastgan_C.has_cuda():
        return "built without CUDA: no nvcc of torch's CUDA version was found (FASTGAN_CUDA=1 demands one)"
    return ""


def status() -> tuple[Backend, Backend]:
    """Rows of :func:`fastgan.backend_status` for the two halves."""
    rows = []
    for device_type in ("cpu", "cuda"):
        missing = _missing(device_type)
        idle = device_type == "cuda" and not torch.cuda.is_available()
        loaded = "built, with no CUDA device to run on" if idle else "loaded"
        rows.append(Backend(f"extension {device_type}", not missing, missing or loaded))
    return rows[0], rows[1]
