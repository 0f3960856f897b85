"""The demonstration: a GAN trained on real digits and scored against held-out ones, and the library timed."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastgan
from fastgan._checks import InputError
from fastgan._files import write_bytes, write_text
from fastgan.bench.timing import device_name
from fastgan.data import LabelledImages, digits
from fastgan.demo_timings import TimedWorkload, time_workloads
from fastgan.metrics import FeatureStats, frechet_distance, load_backbone
from fastgan.recipes import Recipe, load_recipe
from fastgan.training import History, ProgressBar, Trainer, build_networks, class_rows, sample
from fastgan.training.pictures import curves_png, grid_png

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

RECIPE = "sagan-quick-digits"
BACKBONE = "efficientnet_lite0"
REQUIRED = {"sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib", "rich": "rich"}
GRID_COLUMNS = 12
SCORE_BATCH = 50
SCORE_SEED, AGREEMENT_SEED = 1, 2


@dataclass(frozen=True)
class Scores:
    """Frechet distances between ``n`` images and as many held-out real ones."""

    backbone: str
    n: int
    before: float
    after: float
    real: float


@dataclass(frozen=True)
class Agreement:
    """Accuracy of a support vector classifier of pixels, trained on the real training images.

    Attributes:
        held_out: on the held-out real images.
        generated: on generated images, against the class that was asked for.
        per_class: the latter for each class.
    """

    held_out: float
    generated: float
    per_class: tuple[float, ...]


@dataclass
class Stopwatch:
    """Seconds of wall-clock time of each named stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def run_demo(
    out: Path = Path("out/demo"),
    *,
    steps: int | None = None,
    seed: int = 0,
    score_images: int = 300,
    sqrtm_dim: int = 1024,
    timing_seconds: float = 1.0,
) -> dict[str, Any]:
    """Train a small conditional SAGAN on real digits, score and time it, and write what came out.

    Writes ``samples.png`` (a row a class, from the moving average of the generator), ``curves.png`` and ``report.json``
    under ``out``, each at once or not at all.

    Args:
        out: folder, made where it is missing.
        steps: generator updates; by default the recipe's.
        seed: of weights, noise and batches.
        score_images: images a set in the Frechet distances, from 10 to the 599 held out.
        sqrtm_dim: size of the matrices whose square root is timed.
        timing_seconds: about how long to time each pair of fast implementations.

    Returns:
        What ``report.json`` holds.

    Raises:
        InputError: a package of the extra ``demo`` is missing.
        ValueError: ``steps`` or ``score_images`` is out of range.
    """
    _check_packages()
    recipe = load_recipe(RECIPE)
    recipe = replace(
        recipe, train=replace(recipe.train, seed=seed, steps=recipe.train.steps if steps is None else steps)
    )
    train, held_out = digits(recipe.model.resolution)
    if not train.n_classes <= score_images <= len(held_out):
        raise ValueError(f"score_images must be from {train.n_classes} to {len(held_out)}, got {score_images}")

    from rich.console import Console
    from rich.progress import Progress

    console, watch = Console(), Stopwatch()
    with Progress(console=console) as progress:
        trainer = _trainer(recipe, train)
        with watch.stage("score before"):
            scorer = _Scorer(held_out, score_images, progress)
            before = scorer.distance_of_generator(trainer, "scoring the untrained generator")
        with watch.stage("train"):
            history = trainer.run(callbacks=[ProgressBar(progress)])
        with watch.stage("score after"):
            after = scorer.distance_of_generator(trainer, "scoring the trained generator")
            real = scorer.distance(train.images, "scoring real training images")
            scores = Scores(BACKBONE, score_images, before, after, real)
            agreement = _agreement(trainer, train, held_out)
        with watch.stage("timings"):
            timings = time_workloads(progress, seconds=timing_seconds, sqrtm_dim=sqrtm_dim)

    report = _report(recipe, scores, agreement, timings, watch, history)
    out = Path(out)
    grid = sample(trainer.ema.module, class_rows(trainer.gan.n_classes, GRID_COLUMNS), seed=seed)
    write_bytes(out / "samples.png", grid_png(grid, GRID_COLUMNS))
    write_bytes(out / "curves.png", _curves_png(history, scores))
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    _summarise(console, out, scores, agreement, timings, watch)
    return report


def _check_packages() -> None:
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}: pip install 'fastgan[demo]'")


def _trainer(recipe: Recipe, data: LabelledImages) -> Trainer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(recipe.train.seed)
    generator, discriminator = build_networks(recipe.model, data.n_classes, data.images.shape[1])
    return Trainer(generator, discriminator, data, recipe.train, images=recipe.data, device=device)


class _Scorer:
    """Distances to a fixed set of held-out images, whose features are computed once."""

    def __init__(self, held_out: LabelledImages, n: int, progress: Progress) -> None:
        self.n = n
        self.n_classes = held_out.n_classes
        self.progress = progress
        self.backbone = load_backbone(BACKBONE)
        self.reference = self._stats(held_out.images, "scoring held-out images")

    def distance(self, images: Tensor, description: str) -> float:
        return frechet_distance(self._stats(images, description), self.reference)

    def distance_of_generator(self, trainer: Trainer, description: str) -> float:
        labels = torch.arange(self.n) % self.n_classes
        return self.distance(sample(trainer.ema.module, labels, seed=SCORE_SEED), description)

    def _stats(self, images: Tensor, description: str) -> FeatureStats:
        stats = FeatureStats()
        task = self.progress.add_task(description, total=self.n)
        for batch in images[: self.n].split(SCORE_BATCH):
            stats.update(self.backbone((batch.cpu() + 1) / 2))
            self.progress.advance(task, len(batch))
        return stats


def _agreement(trainer: Trainer, train: LabelledImages, held_out: LabelledImages, per_class: int = 50) -> Agreement:
    classify = pixel_classifier(train)
    labels = class_rows(train.n_classes, per_class)
    right = (classify(sample(trainer.ema.module, labels, seed=AGREEMENT_SEED)) == labels).double()
    return Agreement(
        held_out=(classify(held_out.images) == held_out.labels).double().mean().item(),
        generated=right.mean().item(),
        per_class=tuple(right.view(train.n_classes, per_class).mean(1).tolist()),
    )


def pixel_classifier(train: LabelledImages) -> Callable[[Tensor], Tensor]:
    """A support vector classifier fitted to the pixels of ``train``: images (n, c, h, w) to labels (n,), int64."""
    from sklearn.svm import SVC

    def pixels(images: Tensor) -> Any:
        return images.cpu().flatten(1).numpy()

    classifier = SVC().fit(pixels(train.images), train.labels.numpy())
    return lambda images: torch.from_numpy(classifier.predict(pixels(images)))


def _report(
    recipe: Recipe,
    scores: Scores,
    agreement: Agreement,
    timings: list[TimedWorkload],
    watch: Stopwatch,
    history: History,
) -> dict[str, Any]:
    return {
        "versions": {"fastgan": fastgan.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "backends": {b.name: b.detail for b in fastgan.backend_status()},
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "recipe": asdict(recipe),
        "sample_seeds": {"frechet_distance": SCORE_SEED, "classifier_accuracy": AGREEMENT_SEED},
        "frechet_distance": asdict(scores),
        "classifier_accuracy": asdict(agreement),
        "timings": [asdict(timing) | {"speedup": timing.speedup} for timing in timings],
        "wall_seconds": watch.seconds,
        "losses": asdict(history),
    }


def _curves_png(history: History, scores: Scores) -> bytes:
    return curves_png(
        {"discriminator": history.discriminator, "generator": history.generator},
        {"generated": ([0, len(history)], [scores.before, scores.after])},
        score_name=f"Frechet distance to {scores.n} held-out images ({scores.backbone})",
        floors={"real training images": scores.real},
    )


def _summarise(
    console: Console,
    out: Path,
    scores: Scores,
    agreement: Agreement,
    timings: list[TimedWorkload],
    watch: Stopwatch,
) -> None:
    from rich.table import Table

    console.print(f"\nFrechet distance to held-out digits ({scores.backbone}, N = {scores.n}):")
    quality = Table(show_header=False)
    for name, value in (
        ("untrained generator", scores.before),
        ("trained generator", scores.after),
        ("real training digits", scores.real),
    ):
        quality.add_row(name, f"{value:.2f}")
    console.print(quality)
    console.print(
        f"A classifier of real digits recognises {agreement.generated:.1%} of the generated digits as the class "
        f"asked for ({agreement.held_out:.1%} of held-out real ones)."
    )
    console.print("\nMedian times on this machine, in milliseconds (sizes and quantiles are in report.json):")
    speed = Table("work", "baseline", "baseline ms", "fastgan ms", "speed-up")
    for timing in timings:
        baseline, ours = timing.timings[timing.baseline].median, timing.timings["fastgan"].median
        speed.add_row(
            timing.workload, timing.baseline, f"{baseline * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{timing.speedup:.2f}x"
        )
    console.print(speed)
    console.print("Wall-clock seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in watch.seconds.items()))
    for name in ("samples.png", "curves.png", "report.json"):
        console.print(f"wrote {out / name}", soft_wrap=True, highlight=False)
