"""``python -m bench.training``: train recipes on data that needs no download, and record how well they learn.

Each run writes its last grid, its curves and ``metrics.json`` to ``bench/results/training/<name>/``. The metrics are
distances over the steps, images per second, seed, wall time and machine. Runs on digits add the share of images that a
classifier assigns to the requested class, and the variety within classes. Runs on ``photos`` add distances at 10,000
images.
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
from fastgan.data import LabeledImages, sketches_of
from fastgan.demo import distances_within_classes, pixel_classifier
from fastgan.metrics import precision_recall
from fastgan.recipes import load_recipe, override
from fastgan.training import class_rows, sample
from fastgan.training.reports import read_metrics
from fastgan.training.run import Run
from fastgan.training.run_folder import CONFIG, METRICS
from fastgan.training.scoring import Scorer
from fastgan.training.starting import resume_run, start_run

RESULTS = Path(__file__).parent / "results" / "training"
_SHORT = (
    "model.dim_z=64",
    "train.batch_size=32",
    "train.ema_decay=0.98",
    "train.decay_from=0.7",
    "log.backbone=efficientnet_lite0",
    "log.grid_every=100000",
    "log.checkpoint_every=100000",
)
_DIGITS = (
    *_SHORT,
    "data.source=digits",
    "data.flip=false",
    "model.resolution=16",
    "model.generator_width=24",
    "model.discriminator_width=24",
    "model.max_multiplier=4",
    "train.steps=1200",
    "log.score_every=1200",
    "log.score_sizes=[128, 512]",
)
_QUICK_ADAM = ("train.lr_generator=1e-3", "train.lr_discriminator=1e-3", "train.betas=[0.5, 0.99]")
_FEWER_STEPS = ("train.steps=500", "log.score_every=500")
_QUICK_RMSPROP = ("train.lr_generator=5e-4", "train.lr_discriminator=5e-4")
_PHOTOS = (
    *_SHORT,
    "data.source=photos",
    "model.generator_width=32",
    "model.discriminator_width=32",
    "model.max_multiplier=4",
    "train.steps=1500",
    "log.score_every=750",
    "log.score_sizes=[128, 1024]",
)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sagan": ("sagan-digits", ()),
    "wgan-gp": ("wgan-gp-digits", ()),
    "acgan": ("acgan-digits", ()),
    "sketch-cgan": ("sketch-cgan-digits", ()),
    "vit": ("vit-digits", ()),
    "dcgan": ("dcgan", (*_DIGITS, *_QUICK_ADAM)),
    "dcgan-paper": ("dcgan-paper", (*_DIGITS, *_QUICK_ADAM)),
    "acgan-paper": ("acgan-paper", (*_DIGITS, *_QUICK_ADAM)),
    "wgan": ("wgan", (*_DIGITS, *_QUICK_RMSPROP, *_FEWER_STEPS)),
    # The published weight of 0.1 in the generator learns no classes in so few steps.
    "wgan-gp-ac": ("wgan-gp-ac", (*_DIGITS, *_QUICK_ADAM, *_FEWER_STEPS, "train.class_weight_generator=1.0")),
    # As deep as each other and of about the same cost: channels that grow with depth, and as many in every layer.
    "wgan-gp-resnet": ("wgan-gp", (*_DIGITS, *_QUICK_ADAM, *_FEWER_STEPS)),
    "wgan-gp-paper": (
        "wgan-gp-paper",
        (
            *_DIGITS,
            *_QUICK_ADAM,
            *_FEWER_STEPS,
            "model.generator_width=48",
            "model.discriminator_width=48",
            "model.max_multiplier=1",
        ),
    ),
    "csagan-w": ("csagan-w", (*_DIGITS, *_QUICK_RMSPROP, *_FEWER_STEPS, "model.attention_resolution=8")),
    "r3gan": ("r3gan", (*_DIGITS, *_QUICK_ADAM, *_FEWER_STEPS)),
    "dcgan64": (
        "dcgan64",
        (*_DIGITS, *_QUICK_ADAM, "model.resolution=64", "model.generator_width=16", "model.discriminator_width=16"),
    ),
    "photos-dcgan": (
        "dcgan",
        (*_PHOTOS, "train.steps=4000", "train.batch_size=64", "train.ema_decay=0.995", "log.score_every=1000"),
    ),
    "photos-csagan-w": ("csagan-w", (*_PHOTOS, *_QUICK_RMSPROP, *_FEWER_STEPS)),
}
"""The recipe of each run, and the settings that make it small enough for a processor."""
PER_CLASS = 50
SAMPLE_SEED = 2
LEAST_HELD_OUT = 0.97
N_CLASSES = 10
MANY = 10_000


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(RUNS)}.  [default: all]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    runs: Annotated[
        Path | None, typer.Option(help="Folder to keep the runs in and resume them from.  [default: not kept]")
    ] = None,
    change: Annotated[list[str] | None, typer.Option(help="key=value, a setting of the recipe to change.")] = None,
    many: Annotated[bool, typer.Option(help="Also score runs on photographs at 10,000 images, at the end.")] = True,
) -> None:
    """Train on digits and photographs, and write the results."""
    unknown = set(names or ()) - set(RUNS)
    if unknown:
        raise typer.BadParameter(f"no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or RUNS:
            result = train(name, (runs or Path(scratch)) / name, out / name, change or (), many=many)
            for line in result["summary"]:
                typer.echo(f"{name}: {line}")
    typer.echo(f"run `python -m bench report` for the tables of {out}")


def train(name: str, folder: Path, results: Path, changes: Sequence[str] = (), *, many: bool = True) -> dict[str, Any]:
    """Train one of :data:`RUNS` in ``folder``, or resume it there. Judge the result and write it to ``results``."""
    start, load = time.process_time(), os.getloadavg()[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"device": device, "tell": typer.echo, "show_progress": False}
    resumed = (folder / CONFIG).exists()
    if resumed:
        run = resume_run(folder, overrides=changes, **options)
    else:
        recipe, own_changes = RUNS[name]
        run = start_run(override(load_recipe(recipe), [*own_changes, *changes]), folder, **options)
    if run.train() is not None:
        typer.echo(f"interrupted at step {run.trainer.step}")
        raise typer.Exit(1)
    trained = time.process_time() - start
    rows = read_metrics(folder / METRICS)
    floors = {int(key.split("/real/")[1]): value for key, value in rows[0].items() if "/real/" in key}
    judged = judge(run) if run.recipe.data.source == "digits" else at_many(run) if many else last_distance(run)
    result = {
        "recipe": asdict(run.recipe),
        "seed": run.recipe.train.seed,
        "environment": environment(device),
        "machine": f"{os.cpu_count()}-core CPU" if device == "cpu" else torch.cuda.get_device_name(),
        # On a machine with other work CPU time says more than wall time. It is not known for a resumed run.
        "wall_seconds": {"total": rows[-1]["seconds"], "processor": None if resumed else round(trained, 1)},
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "metric": next(key for key in rows[0] if "/real/" in key).partition("/")[0],
        "real_against_real": _named(floors | judged.pop("floors", {})),
        "distances": [{"step": score.step, **_named(score.distances)} for score in run.scores],
        "images_per_second": round(statistics.median(r["images_per_second"] for r in rows if "images_per_second" in r)),
        **judged,
    }
    result["distances"][-1] |= _named(result.pop("last", {}))
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(sorted((folder / "grids").iterdir())[-1], results / "grid.png")
    shutil.copy(folder / "curves.png", results / "curves.png")
    write_text(results / "metrics.json", json.dumps(result, indent=1) + "\n")
    return result


def last_distance(run: Run) -> dict[str, Any]:
    """Summary of the last score."""
    return {"summary": [", ".join(f"{value:.2f} at {n}" for n, value in _named(run.scores[-1].distances).items())]}


def at_many(run: Run) -> dict[str, Any]:
    """Measure the distances at 10,000 images, and the floor there, of the last generator."""
    scorer = Scorer(run.data.held_out, run.data.train, [MANY], backbone=run.recipe.log.backbone)
    last = scorer.score(run.generator, run.trainer.step).distances
    value, floor = last[MANY], scorer.floors[MANY]
    summary = f"{scorer.label} at N = {MANY} is {value:.2f}; of training crops to held-out ones {floor:.2f}"
    return {"floors": scorer.floors, "last": last, "summary": [summary]}


def judge(run: Run) -> dict[str, Any]:
    """Measure how often a support vector classifier of pixels finds the requested class, and the variety."""
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
    variety = _variety(images, classes, held_out, data)
    return {"classifier": found | {"summary": summary}, "variety": variety, "summary": [summary, variety["summary"]]}


def _variety(images: Tensor, labels: Tensor, held_out: LabeledImages, train: LabeledImages) -> dict[str, Any]:
    """Compare the spread within classes and the neighbourhoods of pixels with those of held-out images.

    As many training images are compared in the same way, as a scale.
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
        f"{least:.2f}); recall {near.recall:.2f}, coverage {near.coverage:.2f} (images trained on: "
        f"{seen_near.recall:.2f}, {seen_near.coverage:.2f})",
    }


def _generated(run: Run, held_out: LabeledImages) -> tuple[Tensor, Tensor]:
    if run.generator.sketch_channels:
        sketches = sketches_of(held_out, run.recipe.data.sketches)
        return sample(run.generator, held_out.labels, sketches=sketches), held_out.labels
    labels = class_rows(held_out.n_classes, PER_CLASS)
    return sample(run.generator, labels, seed=SAMPLE_SEED), labels


def _named(distances: dict[int, float]) -> dict[str, float]:
    return {f"N = {n}": round(value, 3) for n, value in distances.items()}


if __name__ == "__main__":
    typer.run(main)
