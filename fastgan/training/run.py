"""A run: the training of a recipe that writes checkpoints, metrics, grids and curves to a folder."""

from __future__ import annotations

import errno
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fastgan import __version__
from fastgan._checks import InputError
from fastgan._files import locked_folder, write_bytes
from fastgan.data import DataSplit
from fastgan.distributed import World, current_world
from fastgan.models import Generator
from fastgan.recipes import Recipe
from fastgan.recipes.build import build_networks
from fastgan.training.checkpoint import Checkpoints, DiskFullError
from fastgan.training.compile_clock import CompileClock
from fastgan.training.reports import MetricsLog, Scores, make_writers, samples_png
from fastgan.training.run_folder import GENERATOR, METRICS
from fastgan.training.scoring import Score, Scorer, score_backbone
from fastgan.training.trainer import Callback, Every, NonFiniteLossError, ProgressBar, Trainer

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class RunError(InputError):
    """Training ended early; the message says why and how to go on."""


class Run:
    """A run in ``out``; make it with :func:`~fastgan.training.starting.start_run` or ``resume_run``.

    If several processes train together, only the first scores and writes, and ``out`` is a folder that all see.

    Attributes:
        recipe: its configuration, in full.
        data: the images.
        trainer: networks, optimizers and loop.
        scores: distances so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        data: DataSplit,
        *,
        device: torch.device | str,
        tell: Callable[[str], None] = print,
        show_progress: bool = True,
        world: World | None = None,
    ) -> None:
        self.recipe, self.out, self.data = recipe, out, data
        self.world = current_world() if world is None else world
        self._tell, self._show_progress = tell, show_progress
        torch.manual_seed(recipe.train.seed)
        generator, discriminator = build_networks(recipe.model, data.train.n_classes, data.train.images.shape[1])
        if generator.n_classes:
            generator.class_names = data.train.class_names
        try:
            self.trainer = Trainer(
                generator, discriminator, data.train, recipe.train, images=recipe.data, device=device, world=self.world
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.checkpoints = Checkpoints(out / "checkpoints")
        with self.world.agreed():
            writers = make_writers(recipe, out) if self.world.is_first else ()
        self._metrics = MetricsLog(out / METRICS, writers)
        self._scores = Scores(recipe.log.score_every, self._make_scorer, self._metrics, self._save_best, tell)
        self._saved_step: int | None = None

    @property
    def scores(self) -> list[Score]:
        return self._scores.history

    def train(self) -> signal.Signals | None:
        """Train to the last step, or until Ctrl-C or SIGTERM, which is then returned; the state is saved either way.

        A signal to one of several processes stops them all.

        Raises:
            RunError: a loss is not finite, or the disk is full; the last good checkpoint is kept.
            InputError: another program trains in the same folder.
        """
        log = self.recipe.log
        callbacks: list[Callback] = [StopOnSignal()]
        if self.world.is_first:
            callbacks += [
                *([ProgressBar()] if self._show_progress else []),
                self._metrics,
                self._scores,
                Every(log.grid_every, self._draw, at_end=True, early=True),
                Every(log.checkpoint_every, self._save, at_end=True),
            ]
        done, steps = self.trainer.step, self.recipe.train.steps
        if done >= steps:
            self._tell(f"{self.out} is finished, {done} of {steps} steps are done: steps={2 * done} would train on")
        elif self.trainer.steps.mode != "eager":
            callbacks.append(CompileClock(self._tell))
        try:
            with ExitStack() as stack:
                with self.world.agreed():
                    if self.world.is_first:
                        stack.enter_context(locked_folder(self.out))
                        self.checkpoints.remove_temporary_files()
                if not done and self.world.is_first:
                    self._draw(self.trainer)
                self.trainer.run(callbacks=callbacks)
                if self.world.is_first:
                    self._save(self.trainer)
        except NonFiniteLossError as error:
            if self.world.is_first and 0 < self.trainer.step < error.step:
                self._save(self.trainer)
            other = f"begin with its weights and other settings by --init {shlex.quote(str(self.out))} --out ..."
            raise RunError(
                f"{error}. {self._how_to_go_on}{'' if self._saved_step is None else f'; {other}'}"
            ) from error
        except OSError as error:
            if isinstance(error, DiskFullError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RunError(f"the disk is full: {error}. {self._how_to_go_on}") from error
            raise
        number = max(self.world.gather(self.trainer.stop_signal))
        return signal.Signals(number) if number else None

    def try_out(self, steps: int = 3) -> None:
        """Do a few steps without callbacks, and report networks, memory and the time that all steps will take."""
        trainer, recipe = self.trainer, self.recipe
        for name, network in (("generator", trainer.generator), ("discriminator", trainer.discriminator)):
            weights = sum(p.numel() for p in network.parameters())
            self._tell(f"{name}: {type(network).__name__}, {weights:,} weights")
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            try:
                trainer.train_step()
                trainer.flush()  # waits for the device
            except NonFiniteLossError as error:
                raise RunError(str(error)) from error
            seconds.append(time.perf_counter() - began)
        if trainer.device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated(trainer.device) / 1e9:.2f} GB on {trainer.device}"
        else:
            memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e9:.2f} GB of the process"
        self._tell(f"peak memory: {memory}")
        whole = min(seconds[1:]) * recipe.train.steps + seconds[0]
        self._tell(
            f"first step {seconds[0]:.2f} s, then {min(seconds[1:]):.3f} s per step: {recipe.train.steps} steps take "
            f"about {timedelta(seconds=round(whole))} without scores, grids and checkpoints; nothing was written"
        )

    def _draw(self, trainer: Trainer) -> None:
        """Write ``grids/<step>.png`` from the moving average, and ``curves.png``."""
        sketches, seed = self.recipe.data.sketches, self.recipe.train.seed
        grid = samples_png(self.generator, self.data.held_out, sketches=sketches, seed=seed)
        write_bytes(self.out / "grids" / f"{trainer.step:06d}.png", grid)
        trainer.flush()
        write_bytes(self.out / "curves.png", self._scores.curves_png(trainer.history))

    def _save(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.step:
            self.checkpoints.save(self.state_dict())
            self._saved_step = trainer.step
            self.generator.save_pretrained(self.out / GENERATOR)

    def _save_best(self) -> None:
        self.checkpoints.save_best(self.state_dict())

    @property
    def generator(self) -> Generator:
        """The moving average of the generator."""
        assert isinstance(self.trainer.ema.module, Generator)
        return self.trainer.ema.module

    @property
    def resume_command(self) -> str:
        return f"fastgan train --resume {shlex.quote(str(self.out))}"

    def state_dict(self) -> dict[str, Any]:
        """Contents of a checkpoint."""
        scores = [{"step": score.step, "distances": score.distances} for score in self.scores]
        return {
            "trainer": self.trainer.state_dict(),
            "generator": self.generator.description,
            "scores": scores,
            "fastgan": __version__,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self._scores.history = [Score(row["step"], dict(row["distances"])) for row in state["scores"]]
        self._saved_step = self.trainer.step

    def _make_scorer(self) -> Scorer:
        data = self.data
        scorer = Scorer(
            data.held_out,
            data.train,
            self.recipe.log.score_sizes,
            backbone=score_backbone(self.recipe),
            device=self.trainer.device,
            sketches=self.recipe.data.sketches,
        )
        floors = ", ".join(f"{value:.2f} (N = {n})" for n, value in scorer.floors.items())
        how = f"protocol {scorer.protocol}, precision {scorer.backbone.precision}"
        self._tell(f"{scorer.label} of real training images to held-out ones ({how}): {floors}")
        return scorer

    @property
    def _how_to_go_on(self) -> str:
        if self._saved_step is None:
            return "No checkpoint had been written; the same command starts the run over."
        return f"The checkpoint of step {self._saved_step} is kept: {self.resume_command}"


class StopOnSignal(Callback):
    """Ends the training after the current step on Ctrl-C or SIGTERM; a second one ends the program at once."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def on_start(self, trainer: Trainer, steps: int) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            trainer.stop_signal = number
            trainer.stop_requested = True
            self._restore()

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, handle)
            except ValueError:  # not in the main thread, where signals cannot be handled
                return

    def on_end(self, trainer: Trainer) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
