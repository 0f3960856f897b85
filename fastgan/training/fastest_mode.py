"""Choose how a run on a CPU updates its networks: measured once per machine and recipe, and kept in a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from fastgan import __version__
from fastgan._files import CACHE, keep_entry, read_entries
from fastgan.backend import device_name
from fastgan.data import LabeledImages
from fastgan.recipes import Recipe
from fastgan.recipes.build import build_networks
from fastgan.training.trainer import NonFiniteLossError, Trainer

FEWEST_STEPS = 200
SHORTEST_RUN = 1800.0  # seconds; compilation takes up to three minutes
TIMED_STEPS = 5
STEP_TIMES = CACHE / "step_modes.json"


def fastest_mode(recipe: Recipe, images: LabeledImages, *, tell: Callable[[str], None]) -> str:
    """Return "compile" if captured updates save this run time on this CPU, their compilation included, else "eager".

    A run of less than half an hour is not worth compiling. For a longer one both modes are timed on copies of its
    networks. :data:`STEP_TIMES` keeps the times by processor, threads, versions, networks and updates.

    Args:
        recipe: the system; ``train.step_mode`` is not read.
        images: the data of the run.
        tell: called with a line about the choice, unless the run is too short for one.
    """
    steps = recipe.train.steps
    if steps < FEWEST_STEPS:
        return "eager"
    key = _key(recipe, images)
    times = read_entries(STEP_TIMES).get(key)
    if times is None:
        try:
            eager, _ = measure(recipe, images, "eager")
            if eager * steps < SHORTEST_RUN:
                return "eager"
            tell("timing captured updates against eager ones, once: expect one to three minutes")
            captured, compilation = measure(recipe, images, "compile")
        except NonFiniteLossError:  # the run will say so
            return "eager"
        times = {"eager": eager, "compile": captured, "compilation": compilation}
        keep_entry(STEP_TIMES, key, times)
    saves = (times["eager"] - times["compile"]) * steps > times["compilation"]
    mode = "compile" if saves else "eager"
    tell(f"step_mode auto: {mode}; a step took {times['compile']:.3g} s captured and {times['eager']:.3g} s eagerly")
    return mode


def measure(recipe: Recipe, images: LabeledImages, mode: str) -> tuple[float, float]:
    """Return the seconds per step in ``mode``, the minimum of a few, and the seconds before the first timed step."""
    networks = build_networks(recipe.model, images.n_classes, images.images.shape[1])
    trainer = Trainer(networks[0], networks[1], images, replace(recipe.train, step_mode=mode), images=recipe.data)
    began = time.perf_counter()
    for _ in range(1 if mode == "eager" else 3):  # captured updates are compared with eager ones at first
        trainer.train_step()
    trainer.flush()
    before = time.perf_counter() - began
    seconds = []
    for _ in range(TIMED_STEPS if mode == "compile" or before < 1 else 1):
        began = time.perf_counter()
        trainer.train_step()
        trainer.flush()
        seconds.append(time.perf_counter() - began)
    return min(seconds), before


def _key(recipe: Recipe, images: LabeledImages) -> str:
    """Hash everything that the time of a step depends on."""
    free = {"steps", "seed", "init", "step_mode"}
    parts = {
        "machine": device_name("cpu"),
        "versions": [__version__, torch.__version__],
        "model": asdict(recipe.model),
        "train": {name: value for name, value in asdict(recipe.train).items() if name not in free},
        "images": [*images.images.shape[1:], images.n_classes],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
