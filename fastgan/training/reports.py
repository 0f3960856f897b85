"""Reports of a run while it trains: metrics, scores, grids, curves; to files, TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgan._checks import InputError
from fastgan._files import write_text
from fastgan.data import LabeledImages, sketches_of
from fastgan.recipes.schema import Recipe
from fastgan.training.pictures import curves_png, grid_picture
from fastgan.training.sampling import class_rows, held_out_index, sample
from fastgan.training.scoring import Score, Scorer
from fastgan.training.trainer import Callback, Every, History, Trainer

Writer = Callable[[int, dict[str, float]], None]

COLUMNS = 8
MAX_ROWS = 16


class MetricsLog(Callback):
    """``metrics.jsonl``: lines with mean losses of a few steps and images per second, and one line per score.

    Each line has the seconds that the run has taken so far, without interruptions. A resumed run drops the lines of the
    steps that it repeats.

    Args:
        path: of the file.
        writers: called with the same values.
    """

    def __init__(self, path: Path, writers: Sequence[Writer] = ()) -> None:
        self.path = path
        self.writers = writers

    def on_start(self, trainer: Trainer, steps: int) -> None:
        before = 0.0
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= trainer.step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            before = kept[-1]["seconds"] if kept else 0.0
        self._began = time.perf_counter() - before
        self.restart_clock()

    def on_losses(self, trainer: Trainer, rows: list[dict[str, float]]) -> None:
        config = trainer.config
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        self.restart_clock()
        values = {f"loss/{name}": sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        values["images_per_second"] = len(rows) * config.n_critic * config.batch_size / seconds
        values["lr/generator"] = float(trainer.optimizer_g.param_groups[0]["lr"])
        values["lr/discriminator"] = float(trainer.optimizer_d.param_groups[0]["lr"])
        self.write(trainer.step, values)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line, and pass the values to the writers."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            seconds = round(time.perf_counter() - self._began, 2)
            file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
        for writer in self.writers:
            writer(step, values)

    def restart_clock(self) -> None:
        """Leave the time since the last losses, in which nothing was trained, out of images per second."""
        self._clock = time.perf_counter()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a ``metrics.jsonl``. Damaged ones are left out, such as the half line after a crash."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"step", "seconds"} <= row.keys():
            rows.append(row)
    return rows


def make_writers(recipe: Recipe, out: Path) -> list[Writer]:
    """Writers that ``recipe.log`` names.

    Raises:
        InputError: a package that one needs is missing.
    """
    writers: list[Writer] = []
    if recipe.log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("log.tensorboard needs tensorboard: pip install 'fastgan[tensorboard]'") from error
        board = SummaryWriter(str(out / "tensorboard"))

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)
            board.flush()

        writers.append(write)
    if recipe.log.wandb:
        try:
            import wandb
        except ImportError as error:
            raise InputError("log.wandb needs wandb: pip install 'fastgan[wandb]'") from error
        out.mkdir(parents=True, exist_ok=True)
        run = wandb.init(project="fastgan", name=out.name, dir=str(out), config=dataclasses.asdict(recipe))
        writers.append(lambda step, values: run.log(values, step=step))
    return writers


class Scores(Every):
    """Scores the moving average on a schedule and keeps the checkpoint with the lowest distance at the most images.

    Attributes:
        history: all scores so far, those from before the run went on included.
        scorer: made when training starts, as it computes the features of the real images.
    """

    def __init__(
        self,
        interval: int,
        make_scorer: Callable[[], Scorer],
        log: MetricsLog,
        save_best: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(interval, self._score, at_end=True, early=True)
        self.history: list[Score] = []
        self.scorer: Scorer | None = None
        self._make_scorer, self._log, self._save_best, self._tell = make_scorer, log, save_best, tell

    def on_start(self, trainer: Trainer, steps: int) -> None:
        super().on_start(trainer, steps)
        if steps and self.scorer is None:
            self.scorer = self._make_scorer()
            if not self.history:
                self._log_distances(trainer, self.scorer.floors, "real/")
                self._score(trainer)
        self._log.restart_clock()

    def _score(self, trainer: Trainer) -> None:
        assert self.scorer is not None
        score = self.scorer.score(trainer.ema.module, trainer.step)
        best = not self.history or score.decisive < min(s.decisive for s in self.history)
        self.history.append(score)
        self._log_distances(trainer, score.distances)
        values = ", ".join(f"{value:.2f} (N = {n})" for n, value in score.distances.items())
        self._tell(f"step {trainer.step}: {self.scorer.label} {values}{', the best so far' if best else ''}")
        if best and trainer.step:
            self._save_best()
        self._log.restart_clock()

    def _log_distances(self, trainer: Trainer, distances: dict[int, float], of: str = "") -> None:
        assert self.scorer is not None
        name = "fid" if self.scorer.label == "FID" else f"frechet_{self.scorer.backbone.name}"
        self._log.write(trainer.step, {f"{name}/{of}{n}": value for n, value in distances.items()})

    def curves_png(self, losses: History) -> bytes:
        """PNG of losses and scores so far."""
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for n in sorted({n for score in self.history for n in score.distances}):
            points = [(float(s.step), s.distances[n]) for s in self.history if n in s.distances]
            curves[f"generated, N = {n}"] = ([step for step, _ in points], [value for _, value in points])
        floors = {} if self.scorer is None else self.scorer.floors
        return curves_png(
            {"discriminator": losses.discriminator, "generator": losses.generator},
            curves,
            score_name="distance" if self.scorer is None else self.scorer.label,
            floors={f"real, N = {n}": value for n, value in floors.items()},
        )


def samples_png(generator: nn.Module, held_out: LabeledImages, *, sketches: str, seed: int) -> bytes:
    """PNG of samples: one row per class for a conditional generator (the first 16 classes), else 8 rows.

    From sketches, held-out sketches alternate with the images made from them.
    """
    names = getattr(generator, "class_names", ())
    if getattr(generator, "sketch_channels", 0):
        shown = held_out.labels.cpu().unique()[:MAX_ROWS]
        labels = shown.repeat_interleave(COLUMNS // 2)
        drawn = sketches_of(held_out.subset(held_out_index(held_out, labels)), sketches)
        shown_names = [names[label] for label in shown] if names else []
        return grid_picture(sample(generator, labels, sketches=drawn), COLUMNS, sketches=drawn, row_names=shown_names)
    classes = int(generator.n_classes)  # type: ignore[arg-type]
    labels = class_rows(min(classes, MAX_ROWS), COLUMNS) if classes > 1 else torch.zeros(8 * COLUMNS, dtype=torch.int64)
    row_names = names[:MAX_ROWS] if classes > 1 else ()
    return grid_picture(sample(generator, labels, seed=seed), COLUMNS, row_names=row_names)
