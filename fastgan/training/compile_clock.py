"""Prediction of how long a train step takes to compile."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

from fastgan._files import write_text
from fastgan.data.libraries import CACHE
from fastgan.training.trainer import Callback, Trainer

COMPILE_TIMES = CACHE / "compile_times.json"
"""Seconds per layer of the last compilation, by kind of device."""


class CompileClock(Callback):
    """Predicts how long compiling takes before the first step, and reports how long it took.

    The prediction is proportional to the number of layers, from the last compilation on this kind of device, whose time
    per layer is kept in :data:`COMPILE_TIMES`.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._began: float | None = None

    def on_start(self, trainer: Trainer, steps: int) -> None:
        if not steps:
            return
        known = _read_times().get(trainer.device.type)
        about = "one to three minutes" if known is None else f"about {known * _layers(trainer):.0f} seconds"
        self._tell(f"compiling the train steps, {about}, once")
        self._began = time.perf_counter()

    def on_step(self, trainer: Trainer) -> None:
        if self._began is None:
            return
        seconds, self._began = time.perf_counter() - self._began, None
        self._tell(f"compiled, with the first step, in {seconds:.0f} s")
        times = _read_times() | {trainer.device.type: seconds / _layers(trainer)}
        with contextlib.suppress(OSError):  # a home without room or permission
            write_text(COMPILE_TIMES.expanduser(), json.dumps(times) + "\n")


def _layers(trainer: Trainer) -> int:
    """Number of modules with weights of their own."""
    networks = (trainer.generator, trainer.discriminator)
    return sum(bool([*module.parameters(recurse=False)]) for network in networks for module in network.modules())


def _read_times() -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in json.loads(COMPILE_TIMES.expanduser().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
