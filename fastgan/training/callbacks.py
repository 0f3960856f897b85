"""What can watch a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from fastgan.training.loop import Trainer


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
    """A rich progress bar with the latest losses.

    Args:
        progress: a running bar to add a task to; without it the callback owns one.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._shared = progress
        self._bar: Progress | None = None

    def on_start(self, trainer: Trainer, steps: int) -> None:
        from rich.progress import Progress

        self._bar = self._shared if self._shared is not None else Progress()
        if self._shared is None:
            self._bar.start()
        self._task = self._bar.add_task("training", total=steps)

    def on_step(self, trainer: Trainer) -> None:
        if self._bar is None:
            return
        history = trainer.history
        losses = f" (loss D {history.discriminator[-1]:.2f}, G {history.generator[-1]:.2f})" if len(history) else ""
        self._bar.update(self._task, advance=1, description=f"training{losses}")

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None and self._shared is None:
            self._bar.stop()
        self._bar = None


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
