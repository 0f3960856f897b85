"""``python -m bench.training``: train recipes on the handwritten digits and keep the evidence that they learn.

For each, ``bench/results/training/<recipe>/`` gets the final grid, the curves, and ``metrics.json`` with distances over
the steps, the agreement of a classifier with the classes asked for, the variety within a class, images a second, seed,
wall time and machine.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from fastgan._files import write_text
from fastgan.bench.records import environment
from fastgan.data import LabelledImages, sketches_of
from fastgan.demo import distances_within_classes, pixel_classifier
from fastgan.metrics import precision_recall
from fastgan.recipes import load_recipe, override
from fastgan.training import class_rows, sample
from fastgan.training.reports import read_metrics
from fastgan.training.run import CONFIG, METRICS, Run, resume_run, start_run

RESULTS = Path(__file__).parent / "results" / "training"
RECIPES = {
    "sagan": "sagan-digits",
    "wgan-gp": "wgan-gp-digits",
    "acgan": "acgan-digits",
    "sketch-cgan": "sketch-cgan-digits",
}
PER_CLASS = 50
SAMPLE_SEED = 2
LEAST_HELD_OUT = 0.97
N_CLASSES = 10


def main(
    recipes: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(RECIPES)}.  [default: all]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    runs: Annotated[
        Path | None,
        typer.Option(help="Keep the runs here, and go on with those that are.  [default: a temporary folder]"),
    ] = None,
    change: Annotated[list[str] | None, typer.Option(help="key=value, a setting of the recipe to change.")] = None,
) -> None:
    """Train on digits and write the results."""
    unknown = set(recipes or ()) - set(RECIPES)
    if unknown:
        raise typer.BadParameter(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in recipes or RECIPES:
            result = train(name, (runs or Path(scratch)) / name, out / name, change or ())
            typer.echo(f"{name}: {result['classifier']['summary']}; {result['wall_seconds']['total']:.0f} s")
            typer.echo(f"{name}: {result['variety']['summary']}")


def train(name: str, folder: Path, results: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Train one recipe in ``folder``, or resume it there; judge it and write ``results``."""
    start = time.process_time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"device": device, "tell": typer.echo, "show_progress": False}
    resumed = (folder / CONFIG).exists()
    if resumed:
        run = resume_run(folder, overrides=changes, **options)
    else:
        run = start_run(override(load_recipe(RECIPES[name]), changes), folder, **options)
    if run.train() is not None:
        typer.echo(f"interrupted at step {run.trainer.step}")
        raise typer.Exit(1)
    rows = read_metrics(folder / METRICS)
    floors = {key.split("/real/")[1]: value for key, value in rows[0].items() if "/real/" in key}
    result = {
        "recipe": asdict(run.recipe),
        "seed": run.recipe.train.seed,
        "environment": environment(device),
        "machine": f"{os.cpu_count()}-core CPU" if device == "cpu" else torch.cuda.get_device_name(),
        # On a machine with other work, seconds of the processor say more; a run that was gone on with has none.
        "wall_seconds": {
            "total": rows[-1]["seconds"],
            "processor": None if resumed else round(time.process_time() - start, 1),
        },
        "metric": next(key for key in rows[0] if "/real/" in key).partition("/")[0],
        "real_against_real": _named({int(n): value for n, value in floors.items()}),
        "distances": [{"step": score.step, **_named(score.distances)} for score in run.scores],
        "images_per_second": round(statistics.median(r["images_per_second"] for r in rows if "images_per_second" in r)),
        **judge(run),
    }
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(sorted((folder / "grids").iterdir())[-1], results / "grid.png")
    shutil.copy(folder / "curves.png", results / "curves.png")
    write_text(results / "metrics.json", json.dumps(result, indent=1) + "\n")
    return result


def judge(run: Run) -> dict[str, Any]:
    """Measure how often a support vector classifier of real pixels agrees with the labels, and the variety."""
    data, held_out = run.data.train, run.data.held_out
    classify = pixel_classifier(data)
    accuracy = (classify(held_out.images) == held_out.labels).double().mean().item()
    if accuracy <= LEAST_HELD_OUT:
        raise RuntimeError(
            f"the classifier must be right on {LEAST_HELD_OUT:.0%} of held-out digits, got {accuracy:.1%}"
        )
    images, labels = _generated(run, held_out)
    images = images.cpu()
    predicted = classify(images)
    found: dict[str, Any] = {"kind": "SVC of pixels", "held_out_accuracy": accuracy, "images": len(images)}
    if run.generator.n_classes:
        right = (predicted == labels).double()
        per_class = [right[labels == label].mean().item() for label in range(data.n_classes)]
        found |= {"agreement": right.mean().item(), "per_class": per_class}
        summary = f"{right.mean().item():.1%} of generated images are of the class asked for"
    else:
        shares = torch.bincount(predicted, minlength=data.n_classes).double() / len(predicted)
        found["class_shares"] = shares.tolist()
        summary = f"classes are predicted from {shares.min().item():.1%} to {shares.max().item():.1%} of the time"
    summary += f" ({accuracy:.1%} of held-out real ones are classified right)"
    classes = labels if run.generator.n_classes else predicted
    return {"classifier": found | {"summary": summary}, "variety": _variety(images, classes, held_out, data)}


def _variety(images: Tensor, labels: Tensor, held_out: LabelledImages, train: LabelledImages) -> dict[str, Any]:
    """Compare the spread within classes, and the neighbourhoods of pixels, with those of held-out real images.

    The same is done for as many of the training images, for scale.
    """
    real, seen = held_out.images.flatten(1), train.images[: len(images)].flatten(1)
    real_spreads = distances_within_classes(real, held_out.labels, N_CLASSES)
    spreads = distances_within_classes(images, labels, N_CLASSES) / real_spreads
    seen_spreads = distances_within_classes(seen, train.labels[: len(images)], N_CLASSES) / real_spreads
    near, seen_near = precision_recall(real, images.flatten(1)), precision_recall(real, seen)
    least = spreads.nan_to_num(0.0).min()
    return {
        "distance_within_class": spreads.nanmean().item(),
        "distance_within_class_per_class": [None if spread.isnan() else spread.item() for spread in spreads],
        "neighbourhoods": asdict(near),
        "trained_on": {"distance_within_class": seen_spreads.mean().item(), "neighbourhoods": asdict(seen_near)},
        "summary": f"generated images of a class lie {spreads.nanmean():.2f} times as far apart as real ones (least "
        f"{least:.2f}); coverage {near.coverage:.2f} (images trained on: {seen_near.coverage:.2f})",
    }


def _generated(run: Run, held_out: LabelledImages) -> tuple[Tensor, Tensor]:
    if run.generator.sketch_channels:
        sketches = sketches_of(held_out, run.recipe.data.sketches)
        return sample(run.generator, held_out.labels, sketches=sketches), held_out.labels
    labels = class_rows(held_out.n_classes, PER_CLASS)
    return sample(run.generator, labels, seed=SAMPLE_SEED), labels


def _named(distances: dict[int, float]) -> dict[str, float]:
    return {f"N = {n}": round(value, 3) for n, value in distances.items()}


if __name__ == "__main__":
    typer.run(main)
