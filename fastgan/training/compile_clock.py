"""Prediction of how long a train step takes to compile."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastgan._files import CACHE, keep_entry, read_entries
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
        known = read_entries(COMPILE_TIMES).get(trainer.device.type)
        if isinstance(known, (int, float)):
            about = f"about {known * _layers(trainer):.0f} seconds"
        else:
            about = "one to three minutes"
        self._tell(f"compiling the train steps, {about}, once")
        self._began = time.perf_counter()

    def on_step(self, trainer: Trainer) -> None:
        if self._began is None:
            return
        seconds, self._began = time.perf_counter() - self._began, None
        self._tell(f"compiled, with the first step, in {seconds:.0f} s")
        keep_entry(COMPILE_TIMES, trainer.device.type, seconds / _layers(trainer))


def _layers(trainer: Trainer) -> int:
    """Number of modules with weights of their own."""
    networks = (trainer.generator, trainer.discriminator)
    return sum(bool([*module.parameters(recurse=False)]) for network in networks for module in network.modules())
