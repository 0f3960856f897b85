"""How accurately a feature network computes: fp32, tf32 or bf16, and which of them ``auto`` is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastgan._checks import InputError

PRECISIONS = ("auto", "fp32", "tf32", "bf16")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``"fp32"``, ``"tf32"`` or ``"bf16"`` for ``precision`` on ``device``.

    ``"auto"`` is tf32 on a GPU that has it and fp32 elsewhere. bf16 is never chosen unasked: its rounding changes a
    Frechet distance by more than 0.01.

    Raises:
        ValueError: ``precision`` is unknown.
        InputError: tf32 on a device that has none.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto":
        return "tf32" if has_tf32 else "fp32"
    if precision == "tf32" and not has_tf32:
        raise InputError(f"precision tf32 needs a GPU of compute capability 8.0 or newer, the device is {device}")
    return precision


@contextmanager
def float32_arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Convolutions and matrix products of float32 in full precision, or in tf32 for ``"tf32"``; CUDA's alone.

    torch's own default is tf32 for convolutions, which "fp32" must not mean.
    """
    if device.type != "cuda":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    wanted = "tf32" if precision == "tf32" else "ieee"
    try:
        for backend in backends:
            backend.fp32_precision = wanted
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
