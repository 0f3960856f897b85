"""The highest rates of a device per second, from which the floors of workloads follow.

An H100's are those of its data sheet. A CPU's are measured when they are first asked for, by a matrix product and a
copy that are large enough to reach them: processors differ too much, and so do the shares of them that virtual machines
get.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from fastgan.bench.harness import wait

_DTYPES = (torch.float32, torch.float64)
EXPONENTIAL = 16
"""Operations of an exponential on a CPU: a polynomial of degree 6 and 2 more multiply-adds."""

_TRIES = 10


@functools.cache
def operations(device: str, dtype: torch.dtype) -> float:
    """Return additions and multiplications per second of matrix products; on a GPU, float32 ones by TF32."""
    if device == "cuda":
        return 8e14 if dtype.itemsize == 2 else 8e14 / 6  # three TF32 products at half the rate of float16
    size = 1024
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), device)


def exponentials(device: str, dtype: torch.dtype) -> float:
    """Return exponentials per second; those of a GPU have units of their own."""
    return 4e12 if device == "cuda" else operations(device, dtype) / EXPONENTIAL


@functools.cache
def copied_bytes(device: str, size: int = 1 << 28) -> float:
    """Return bytes per second, read and written, of a copy of ``size`` bytes: less than the caches hold is faster."""
    source = torch.ones((1 << 30 if device == "cuda" else max(size, 1 << 12)) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _fastest(lambda: target.copy_(source), device)


def seconds(device: str, dtype: torch.dtype, products: float, maps: float, moved: int) -> float:
    """Return the least time for ``products`` operations, ``maps`` exponentials and ``moved`` bytes.

    All overlap, but products and exponentials of a CPU, which take turns in the same units.
    """
    multiplying, exponentiating = products / operations(device, dtype), maps / exponentials(device, dtype)
    if device == "cuda":
        return max(multiplying, exponentiating, moved / 3.0e12)
    return max(multiplying + exponentiating, moved / copied_bytes(device, int(moved) // 2))


def description() -> str:
    """Return the limits of this CPU in words."""
    rates = [f"{str(d).removeprefix('torch.')} {operations('cpu', d) / 1e9:.0f} GFLOP/s" for d in _DTYPES]
    return f"{', '.join(rates)}, copies {copied_bytes('cpu') / 1e9:.1f} GB/s"


def _fastest(call: Callable[[], object], device: str) -> float:
    best = float("inf")
    for _ in range(_TRIES):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best
