"""What a run writes while it trains: metrics, grids, curves, scores, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgan._files import write_bytes, write_text
from fastgan.data import LabelledImages, sketches_of
from fastgan.training.callbacks import Callback
from fastgan.training.checkpoint import Checkpoints
from fastgan.training.pictures import curves_png, grid_png
from fastgan.training.sampling import class_rows, sample
from fastgan.training.scoring import Score, Scorer

if TYPE_CHECKING:
    from torch import nn

    from fastgan.training.trainer import Trainer

Writer = Callable[[int, dict[str, float]], None]

COLUMNS = 8
MAX_ROWS = 16


class Scheduled(Callback):
    """Calls :meth:`act` after every ``interval`` steps, and after the last."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._end = 0

    def act(self, trainer: Trainer) -> None:
        """What is to be done."""
        raise NotImplementedError

    def on_start(self, trainer: Trainer, steps: int) -> None:
        self._end = trainer.step + steps

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step % self.interval == 0 or trainer.step == self._end:
            self.act(trainer)


class MetricsLog(Callback):
    """``metrics.jsonl``: a line for the mean losses of some steps with images a second, and a line for each score. Each
    tells the seconds that the run has taken, interruptions left out.

    Lines of steps after the one where a run goes on, which it left when it ended badly, are dropped at the start.

    Args:
        path: of the file.
        writers: told the same.
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
        """Append a line, and tell the writers."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            seconds = round(time.perf_counter() - self._began, 2)
            file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
        for writer in self.writers:
            writer(step, values)

    def restart_clock(self) -> None:
        """What was done since the last losses was no training: leave it out of images a second."""
        self._clock = time.perf_counter()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without the half of one that a crash may have left."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Scores(Scheduled):
    """Scores the moving average on a schedule and keeps the checkpoint with the lowest distance at the most images.

    Attributes:
        history: all scores so far; a run that goes on puts those of before here.
        scorer: made when training starts, as it computes the features of the real images.
    """

    def __init__(
        self,
        interval: int,
        make_scorer: Callable[[], Scorer],
        log: MetricsLog,
        save_best: Callable[[Trainer], None],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(interval)
        self.history: list[Score] = []
        self.scorer: Scorer | None = None
        self._make_scorer, self._log, self._save_best, self._tell = make_scorer, log, save_best, tell

    def on_start(self, trainer: Trainer, steps: int) -> None:
        super().on_start(trainer, steps)
        if steps and self.scorer is None:
            self.scorer = self._make_scorer()
            if not self.history:
                self._log_distances(trainer, self.scorer.floors, "real/")
                self.act(trainer)
        self._log.restart_clock()

    def act(self, trainer: Trainer) -> None:
        assert self.scorer is not None
        score = self.scorer.score(trainer.ema.module, trainer.step)
        best = not self.history or score.decisive < min(s.decisive for s in self.history)
        self.history.append(score)
        self._log_distances(trainer, score.distances)
        values = ", ".join(f"{value:.2f} (N = {n})" for n, value in score.distances.items())
        self._tell(f"step {trainer.step}: {self.scorer.label} {values}{', the best so far' if best else ''}")
        if best and trainer.step:
            self._save_best(trainer)
        self._log.restart_clock()

    def _log_distances(self, trainer: Trainer, distances: dict[int, float], of: str = "") -> None:
        assert self.scorer is not None
        name = "fid" if self.scorer.label == "FID" else f"frechet_{self.scorer.backbone.name}"
        self._log.write(trainer.step, {f"{name}/{of}{n}": value for n, value in distances.items()})


class Grids(Scheduled):
    """``grids/<step>.png`` from the moving average; see :func:`grid_of`."""

    def __init__(self, interval: int, folder: Path, held_out: LabelledImages, sketches: str, seed: int) -> None:
        super().__init__(interval)
        self.folder, self.held_out, self.sketches, self.seed = folder, held_out, sketches, seed

    def act(self, trainer: Trainer) -> None:
        picture = grid_of(trainer.ema.module, self.held_out, sketches=self.sketches, seed=self.seed)
        write_bytes(self.folder / f"{trainer.step:06d}.png", picture)


class Curves(Scheduled):
    """``curves.png``: losses and scores so far."""

    def __init__(self, interval: int, path: Path, scores: Scores) -> None:
        super().__init__(interval)
        self.path, self.scores = path, scores

    def act(self, trainer: Trainer) -> None:
        trainer.flush()
        history, scorer = self.scores.history, self.scores.scorer
        sizes = sorted({n for score in history for n in score.distances})
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for n in sizes:
            points = [(float(s.step), s.distances[n]) for s in history if n in s.distances]
            curves[f"generated, N = {n}"] = ([step for step, _ in points], [value for _, value in points])
        floors = {} if scorer is None else {f"real, N = {n}": value for n, value in scorer.floors.items()}
        losses = {"discriminator": trainer.history.discriminator, "generator": trainer.history.generator}
        label = "distance" if scorer is None else scorer.label
        write_bytes(self.path, curves_png(losses, curves, score_name=label, floors=floors))


class Saver(Scheduled):
    """The last checkpoint, on a schedule."""

    def __init__(self, interval: int, checkpoints: Checkpoints, state: Callable[[Trainer], dict[str, Any]]) -> None:
        super().__init__(interval)
        self.checkpoints, self.state = checkpoints, state
        self.saved_step: int | None = None

    def act(self, trainer: Trainer) -> None:
        if self.saved_step != trainer.step:
            self.checkpoints.save(self.state(trainer))
            self.saved_step = trainer.step


def grid_of(
    generator: nn.Module,
    held_out: LabelledImages,
    *,
    sketches: str = "none",
    seed: int = 0,
    columns: int = COLUMNS,
    truncation: float | None = None,
) -> bytes:
    """A PNG: a row a class for a conditional generator (the first 16 classes), else 8 rows.

    From sketches, the columns are held-out sketches and what was made of each, in turns.
    """
    classes = int(generator.n_classes)  # type: ignore[arg-type]
    if getattr(generator, "sketch_channels", 0):
        return _sketch_grid(generator, held_out, sketches, columns)
    labels = class_rows(min(classes, MAX_ROWS), columns) if classes > 1 else torch.zeros(8 * columns, dtype=torch.int64)
    images = sample(generator, labels, seed=seed, truncation=truncation)
    return grid_png(images, columns, scale=scale_of(images))


def _sketch_grid(generator: nn.Module, held_out: LabelledImages, sketches: str, columns: int) -> bytes:
    data = _first_of_each_class(held_out, columns // 2)
    drawn = sketches_of(data, sketches).cpu()
    images = sample(generator, data.labels.cpu(), sketches=drawn).cpu()
    pairs = torch.stack([drawn.expand_as(images), images], 1).flatten(0, 1)
    return grid_png(pairs, columns, scale=scale_of(images))


def _first_of_each_class(data: LabelledImages, n: int) -> LabelledImages:
    labels = data.labels.cpu()
    classes = labels.unique()[:MAX_ROWS]
    index = [
        torch.nonzero(labels == label).squeeze(1)[torch.arange(n) % int((labels == label).sum())] for label in classes
    ]
    return data.subset(torch.cat(index).to(data.labels.device))


def scale_of(images: Tensor) -> int:
    """How much to enlarge small images in a grid."""
    return max(1, 64 // images.shape[-1])
