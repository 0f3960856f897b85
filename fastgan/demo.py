"""Demonstration: time the library against the usual code, train a small GAN on real digits, and score it."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastgan
from fastgan._checks import InputError
from fastgan._files import write_bytes, write_text
from fastgan._progress import progress_bar
from fastgan.bench import Record, environment, run
from fastgan.bench.quick import workloads
from fastgan.data import LabeledImages, digits
from fastgan.recipes import load_recipe
from fastgan.training import Every, ProgressBar, Trainer, build_networks, class_rows, sample
from fastgan.training.pictures import grid_picture
from fastgan.training.scoring import Scorer

RECIPE = "sagan-digits"
STEPS = 1400  # generator updates, in about a minute on two CPU cores
BACKBONE = "efficientnet_lite0"
REQUIRED = {"sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib", "rich": "rich"}
GRID_COLUMNS = 10
JUDGED_PER_CLASS = 50
JUDGED_SEED = 2
SCORES = 6
"""Points of the curve of distances, the one before the first step included."""


def run_demo(
    out: Path = Path("out/demo"),
    *,
    steps: int = STEPS,
    seed: int = 0,
    score_images: int = 300,
    sqrtm_dim: int = 1024,
    timing_seconds: float = 1.0,
) -> dict[str, Any]:
    """Time three kinds of work, train a small conditional SAGAN on real digits, score it, and write the results.

    Write ``report.png`` (speeds, samples and curves in one picture), ``samples.png`` (one row per class, from the
    moving average of the generator) and ``report.json`` under ``out``, each whole or not at all.

    Args:
        out: folder, created if missing.
        steps: generator updates.
        seed: seed of weights, noise and batches.
        score_images: images per set in the Frechet distances, from 10 to the 599 held out.
        sqrtm_dim: size of the matrices whose square root is timed.
        timing_seconds: approximate seconds to time each workload, all implementations together.

    Returns:
        The content of ``report.json``.

    Raises:
        InputError: a package of the extra ``demo`` is missing.
        ValueError: ``steps`` or ``score_images`` is out of range.

    Example:
        >>> report = run_demo(Path("demo"))  # doctest: +SKIP
        >>> report["frechet_distance"]["after"] < report["frechet_distance"]["before"]  # doctest: +SKIP
        True
    """
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}: pip install 'fastgan[demo]'")
    recipe = load_recipe(RECIPE)
    recipe = replace(recipe, train=replace(recipe.train, seed=seed, steps=steps))
    train, held_out = digits(recipe.model.resolution or 32)
    if not train.n_classes <= score_images <= len(held_out):
        raise ValueError(f"score_images must be from {train.n_classes} to {len(held_out)}, got {score_images}")

    from rich.console import Console

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: dict[str, float] = {}
    console = Console()
    with progress_bar() as progress:
        torch.manual_seed(seed)
        networks = build_networks(recipe.model, train.n_classes, train.images.shape[1])
        trainer = Trainer(*networks, train, recipe.train, images=recipe.data, device=device)
        with _timed(seconds, "speeds"):
            timings = _time(device, sqrtm_dim, timing_seconds, progress)
        with _timed(seconds, "training and scores"):
            scorer = Scorer(held_out, train, [score_images], backbone=BACKBONE)
            scores: dict[int, float] = {}

            def score(trainer: Trainer) -> None:
                scores[trainer.step] = scorer.score(trainer.ema.module, trainer.step).decisive

            score(trainer)
            every = Every(max(1, steps // (SCORES - 1)), score, at_end=True)
            history = trainer.run(callbacks=[ProgressBar(progress), every])
            quality = _judge(trainer.ema.module, train, held_out)

    distances = {"before": scores[0], "after": scores[trainer.step], "real": scorer.floors[score_images]}
    report = {
        "versions": {"fastgan": fastgan.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "backends": {b.name: b.detail for b in fastgan.backend_status()},
        "device": environment(device)["device"],
        "timings": [asdict(record) for record in timings],
        "recipe": asdict(recipe),
        "frechet_distance": {"backbone": BACKBONE, "n": score_images, **distances, "by_step": scores},
        "quality": quality,
        "wall_seconds": seconds,
        "losses": asdict(history),
    }
    out = Path(out)
    grid = grid_picture(sample(trainer.ema.module, class_rows(train.n_classes, GRID_COLUMNS), seed=seed), GRID_COLUMNS)
    write_bytes(out / "samples.png", grid)
    write_bytes(out / "report.png", _picture(report, grid))
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    _summarize(console, out, report)
    return report


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


def _time(device: str, sqrtm_dim: int, seconds: float, progress: Any) -> list[Record]:
    """Time each workload of the quick bench; two records per workload, that of the usual code first."""
    task = progress.add_task("speeds", total=None)
    records: list[Record] = []
    for workload in workloads(device, sqrtm_dim):
        records += run("demo", workload, seconds, device)
        progress.advance(task)
    for record in records:
        if record.median is None:
            raise RuntimeError(f"{record.workload}, {record.implementation}: {record.failure}")
    progress.update(task, total=len(records) // 2)
    return records


def pixel_classifier(train: LabeledImages) -> Callable[[Tensor], Tensor]:
    """Fit a support vector classifier to the pixels of ``train``: images (n, c, h, w) to labels (n,), int64."""
    from sklearn.svm import SVC

    def pixels(images: Tensor) -> Any:
        return images.cpu().flatten(1).numpy()

    classifier = SVC().fit(pixels(train.images), train.labels.numpy())
    return lambda images: torch.from_numpy(classifier.predict(pixels(images)))


def distances_within_classes(images: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean distance of two images of a class, per class (n_classes,), float64; NaN if it has fewer than two."""
    pixels = images.cpu().double().flatten(1)
    return torch.stack([torch.pdist(pixels[labels.cpu() == label]).mean() for label in range(n_classes)])


def _judge(generator: nn.Module, train: LabeledImages, held_out: LabeledImages) -> dict[str, Any]:
    """Accuracy of a classifier of real digits on real and generated ones, and the variety within classes."""
    classify = pixel_classifier(train)
    labels = class_rows(train.n_classes, JUDGED_PER_CLASS)
    images = sample(generator, labels, seed=JUDGED_SEED)
    right = (classify(images) == labels).double()
    spreads = distances_within_classes(images, labels, train.n_classes)
    real_spreads = distances_within_classes(held_out.images, held_out.labels, train.n_classes)
    return {
        "accuracy_held_out": (classify(held_out.images) == held_out.labels).double().mean().item(),
        "accuracy_generated": right.mean().item(),
        "accuracy_per_class": right.view(train.n_classes, -1).mean(1).tolist(),
        "variety": (spreads / real_spreads).mean().item(),
    }


def _pairs(report: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The records of each workload: the usual code's, and fastgan's."""
    return list(zip(report["timings"][::2], report["timings"][1::2], strict=True))


def _picture(report: dict[str, Any], grid: bytes) -> bytes:
    """PNG of speeds, curves and samples on one page."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figure = Figure(figsize=(13, 8), layout="constrained", dpi=100)
    versions, distance, quality = report["versions"], report["frechet_distance"], report["quality"]
    figure.suptitle(f"fastgan {versions['fastgan']} on {report['device']}, torch {versions['torch']}", fontsize=12)
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.35, 1])
    top, bottom = halves[0].subfigures(2, 1, height_ratios=[1, 1.1])

    axes = top.subplots()
    pairs = _pairs(report)[::-1]
    ratios = [usual["median"] / own["median"] for usual, own in pairs]
    axes.barh(range(len(pairs)), ratios, height=0.4)
    for row, ((usual, own), ratio) in enumerate(zip(pairs, ratios, strict=True)):
        memory = f"memory {' to '.join(_memory(usual, own))}" if _memory(usual, own) else ""
        axes.text(0, row + 0.25, usual["workload"], fontsize=11, va="bottom")
        axes.annotate(
            f"{ratio:.1f}×  {1e3 * usual['median']:.4g} ms to {1e3 * own['median']:.4g} ms\n{memory}".strip(),
            (ratio, row),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(1, color="gray", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, 1.7 * max(ratios)), ylim=(-0.5, len(pairs) - 0.3), yticks=[])
    axes.set_xlabel(
        f"times faster than {', '.join(dict.fromkeys(usual['implementation'] for usual, _ in pairs[::-1]))}"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)

    losses, distances = bottom.subplots(1, 2)
    for name in ("discriminator", "generator"):
        losses.plot(report["losses"][name], label=name, linewidth=0.7)
    losses.set(title="Losses", xlabel="step")
    losses.legend(fontsize="small")
    distances.plot([*distance["by_step"]], [*distance["by_step"].values()], marker="o", label="generated digits")
    distances.axhline(distance["real"], color="gray", linestyle="--", label=f"real digits: {distance['real']:.1f}")
    distances.set(title=f"Frechet distance, N = {distance['n']}", xlabel="step", ylim=(0, None))
    distances.legend(fontsize="small")

    samples = halves[1].subplots()
    samples.imshow(imread(BytesIO(grid)), interpolation="nearest")
    samples.set_axis_off()
    samples.set_title(
        f"Generated digits: distance {distance['after']:.1f}, "
        f"{quality['accuracy_generated']:.0%} recognized,\nvariety {quality['variety']:.2f} of the real digits'",
        fontsize=11,
    )
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _memory(usual: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Peak memory of both; empty if one is unknown, as SciPy's own is, which torch's allocator does not see."""
    peaks = [usual["peak_memory"], own["peak_memory"]]
    if None in peaks or usual["implementation"] == "scipy":
        return []
    return [f"{peak / 1e6:.0f} MB" for peak in peaks]


def _summarize(console: Any, out: Path, report: dict[str, Any]) -> None:
    from rich.table import Table

    console.print("\nMedian times on this machine (sizes and quantiles are in report.json):")
    for usual, own in _pairs(report):
        line = f"  {1e3 * own['median']:.4g} ms, {usual['implementation']} {1e3 * usual['median']:.4g} ms: "
        line += f"{usual['median'] / own['median']:.1f} times faster"
        if _memory(usual, own):
            line += f"; {' instead of '.join(_memory(usual, own)[::-1])}"
        console.print(own["workload"], highlight=False)
        console.print(line)
    distance, quality = report["frechet_distance"], report["quality"]
    console.print(f"\nFrechet distance to held-out digits ({distance['backbone']}, N = {distance['n']}):")
    table = Table(show_header=False)
    for label, key in (
        ("untrained generator", "before"),
        ("trained generator", "after"),
        ("real training digits", "real"),
    ):
        table.add_row(label, f"{distance[key]:.2f}")
    console.print(table)
    console.print(
        f"A classifier of real digits recognizes {quality['accuracy_generated']:.1%} of the generated digits as the "
        f"class asked for ({quality['accuracy_held_out']:.1%} of held-out real ones). Digits of a class lie "
        f"{quality['variety']:.2f} times as far apart as real ones."
    )
    console.print(
        "Wall-clock seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report["wall_seconds"].items())
    )
    for name in ("samples.png", "report.json", "report.png"):
        console.print(f"wrote {out / name}", soft_wrap=True, highlight=False)
