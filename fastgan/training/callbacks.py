"""What can watch a training run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from fastgan.training.trainer import Trainer


class Callback:
    """Base class: override what is of interest. ``trainer.step`` is the number of steps done."""

    def on_start(self, trainer: Trainer, steps: int) -> None:
        """Before the first of ``steps`` steps."""

    def on_step(self, trainer: Trainer) -> None:
        """After each step. Losses reach ``trainer.history`` with a delay, as reading them stalls a GPU."""

    def on_losses(self, trainer: Trainer, rows: list[dict[str, float]]) -> None:
        """When losses have been read: a mapping for each step since the last call, up to ``trainer.step``, with
        "discriminator", "generator", and their terms as "discriminator/adversarial" and so on."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or after an error, once :meth:`on_start` was called."""


class ProgressBar(Callback):
    """A bar with the latest losses, images a second and the time that is left.

    Args:
        progress: a running bar to add a task to; without it the callback owns one.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._shared = progress
        self._bar: Progress | None = None

    def on_start(self, trainer: Trainer, steps: int) -> None:
        self._bar = _new_bar() if self._shared is None else self._shared
        if self._shared is None:
            self._bar.start()
        self._task = self._bar.add_task("training", total=steps)
        self._clock = time.perf_counter()

    def on_losses(self, trainer: Trainer, rows: list[dict[str, float]]) -> None:
        if self._bar is None:
            return
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        self._clock = time.perf_counter()
        rate = len(rows) * trainer.config.n_critic * trainer.config.batch_size / seconds
        losses = f"loss D {rows[-1]['discriminator']:.2f}, G {rows[-1]['generator']:.2f}"
        self._bar.update(self._task, description=f"training ({losses}, {rate:.0f} images/s)")

    def on_step(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1)

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None and self._shared is None:
            self._bar.stop()
        self._bar = None


def _new_bar() -> Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )


class Every(Callback):
    """Call ``action(trainer)`` after every ``interval`` steps."""

    def __init__(self, interval: int, action: Callable[[Trainer], None]) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        self.action = action

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step % self.interval == 0:
            self.action(trainer)
