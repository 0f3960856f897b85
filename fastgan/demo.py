"""Demonstration: train a small GAN on real digits, score it against held-out ones, and time the library."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastgan
from fastgan._checks import InputError
from fastgan._files import write_bytes, write_text
from fastgan.bench import Workload, environment, run
from fastgan.bench.quick import workloads
from fastgan.data import LabelledImages, digits
from fastgan.recipes import load_recipe
from fastgan.training import ProgressBar, Trainer, build_networks, class_rows, sample
from fastgan.training.pictures import curves_png, grid_picture
from fastgan.training.scoring import Scorer

RECIPE = "sagan-quick-digits"
BACKBONE = "efficientnet_lite0"
REQUIRED = {"sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib", "rich": "rich"}
GRID_COLUMNS = 12
CLASSIFIED_PER_CLASS = 50
CLASSIFIED_SEED = 2


def run_demo(
    out: Path = Path("out/demo"),
    *,
    steps: int | None = None,
    seed: int = 0,
    score_images: int = 300,
    sqrtm_dim: int = 1024,
    timing_seconds: float = 1.0,
) -> dict[str, Any]:
    """Train a small conditional SAGAN on real digits, score and time it, and write the results.

    Writes ``samples.png`` (a row per class, from the moving average of the generator), ``curves.png`` and
    ``report.json`` under ``out``, each at once or not at all.

    Args:
        out: folder, created if missing.
        steps: generator updates; by default the recipe's.
        seed: seed of weights, noise and batches.
        score_images: images per set in the Frechet distances, from 10 to the 599 held out.
        sqrtm_dim: size of the matrices whose square root is timed.
        timing_seconds: approximate seconds to time each workload, all implementations together.

    Returns:
        The content of ``report.json``.

    Raises:
        InputError: a package of the extra ``demo`` is missing.
        ValueError: ``steps`` or ``score_images`` is out of range.
    """
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}: pip install 'fastgan[demo]'")
    recipe = load_recipe(RECIPE)
    steps = recipe.train.steps if steps is None else steps
    recipe = replace(recipe, train=replace(recipe.train, seed=seed, steps=steps))
    train, held_out = digits(recipe.model.resolution or 32)
    if not train.n_classes <= score_images <= len(held_out):
        raise ValueError(f"score_images must be from {train.n_classes} to {len(held_out)}, got {score_images}")

    from rich.console import Console
    from rich.progress import Progress

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: dict[str, float] = {}
    console = Console()
    with Progress(console=console) as progress:
        torch.manual_seed(seed)
        networks = build_networks(recipe.model, train.n_classes, train.images.shape[1])
        trainer = Trainer(*networks, train, recipe.train, images=recipe.data, device=device)
        with _timed(seconds, "score before"):
            scorer = Scorer(held_out, train, [score_images], backbone=BACKBONE)
            before = scorer.score(trainer.ema.module, 0).decisive
        with _timed(seconds, "train"):
            history = trainer.run(callbacks=[ProgressBar(progress)])
        with _timed(seconds, "score after"):
            after = scorer.score(trainer.ema.module, trainer.step).decisive
            distances = {"before": before, "after": after, "real": scorer.floors[score_images]}
            accuracy = _classifier_accuracy(trainer.ema.module, train, held_out)
        with _timed(seconds, "timings"):
            timings = _time(workloads(device, sqrtm_dim), timing_seconds, device, progress)

    report = {
        "versions": {"fastgan": fastgan.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "backends": {b.name: b.detail for b in fastgan.backend_status()},
        "device": environment(device)["device"],
        "recipe": asdict(recipe),
        "frechet_distance": {"backbone": BACKBONE, "n": score_images, **distances},
        "classifier_accuracy": accuracy,
        "timings": timings,
        "wall_seconds": seconds,
        "losses": asdict(history),
    }
    out = Path(out)
    grid = sample(trainer.ema.module, class_rows(train.n_classes, GRID_COLUMNS), seed=seed)
    curves = curves_png(
        {"discriminator": history.discriminator, "generator": history.generator},
        {"generated": ([0, len(history)], [before, after])},
        score_name=f"Frechet distance to {score_images} held-out images ({BACKBONE})",
        floors={"real training images": distances["real"]},
    )
    write_bytes(out / "samples.png", grid_picture(grid, GRID_COLUMNS))
    write_bytes(out / "curves.png", curves)
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    _summarize(console, out, report)
    return report


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


def pixel_classifier(train: LabelledImages) -> Callable[[Tensor], Tensor]:
    """Fit a support vector classifier to the pixels of ``train``: images (n, c, h, w) to labels (n,), int64."""
    from sklearn.svm import SVC

    def pixels(images: Tensor) -> Any:
        return images.cpu().flatten(1).numpy()

    classifier = SVC().fit(pixels(train.images), train.labels.numpy())
    return lambda images: torch.from_numpy(classifier.predict(pixels(images)))


def _classifier_accuracy(generator: nn.Module, train: LabelledImages, held_out: LabelledImages) -> dict[str, Any]:
    """Accuracy of a classifier of real digits on held-out ones, and on samples of each class."""
    classify = pixel_classifier(train)
    labels = class_rows(train.n_classes, CLASSIFIED_PER_CLASS)
    right = (classify(sample(generator, labels, seed=CLASSIFIED_SEED)) == labels).double()
    return {
        "held_out": (classify(held_out.images) == held_out.labels).double().mean().item(),
        "generated": right.mean().item(),
        "per_class": right.view(train.n_classes, -1).mean(1).tolist(),
    }


def _time(workloads: Iterator[Workload], seconds: float, device: str, progress: Any) -> list[dict[str, Any]]:
    """Time each workload; in the report a workload is one row with the quantiles of each implementation."""
    task = progress.add_task("timing against eager code", total=None)
    rows = []
    for workload in workloads:
        records = run("demo", workload, seconds, device)
        timings = {}
        for record in records:
            if record.median is None:
                raise RuntimeError(f"{workload.name}, {record.implementation}: {record.failure}")
            timings[record.implementation] = {key: getattr(record, key) for key in ("median", "low", "high", "rounds")}
        speedup = timings[workload.reference]["median"] / timings["fastgan"]["median"]
        rows.append(
            {
                "workload": workload.name,
                "size": workload.parameters,
                "baseline": workload.reference,
                "device": device,
                "timings": timings,
                "speedup": speedup,
            }
        )
        progress.advance(task)
    progress.update(task, total=len(rows))
    return rows


def _summarize(console: Any, out: Path, report: dict[str, Any]) -> None:
    from rich.table import Table

    distance, accuracy = report["frechet_distance"], report["classifier_accuracy"]
    console.print(f"\nFrechet distance to held-out digits ({distance['backbone']}, N = {distance['n']}):")
    quality = Table(show_header=False)
    for label, key in (
        ("untrained generator", "before"),
        ("trained generator", "after"),
        ("real training digits", "real"),
    ):
        quality.add_row(label, f"{distance[key]:.2f}")
    console.print(quality)
    console.print(
        f"A classifier of real digits recognises {accuracy['generated']:.1%} of the generated digits as the class "
        f"asked for ({accuracy['held_out']:.1%} of held-out real ones)."
    )
    console.print("\nMedian times on this machine, in milliseconds (sizes and quantiles are in report.json):")
    speed = Table("work", "baseline", "baseline ms", "fastgan ms", "speed-up")
    for row in report["timings"]:
        medians = [f"{1e3 * row['timings'][name]['median']:.2f}" for name in (row["baseline"], "fastgan")]
        speed.add_row(row["workload"], row["baseline"], *medians, f"{row['speedup']:.2f}x")
    console.print(speed)
    console.print(
        "Wall-clock seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report["wall_seconds"].items())
    )
    for name in ("samples.png", "curves.png", "report.json"):
        console.print(f"wrote {out / name}", soft_wrap=True, highlight=False)
