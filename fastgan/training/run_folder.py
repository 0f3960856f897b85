"""The folder of a run: the names of its files, its configuration and its generator."""

from __future__ import annotations

from pathlib import Path

import torch

from fastgan._checks import InputError
from fastgan.models import Generator
from fastgan.models.base import RUN_FOLDER
from fastgan.recipes import Recipe, load_recipe
from fastgan.training.checkpoint import BEST, LAST, read_checkpoint

CONFIG, METRICS, GENERATOR = "config.yaml", "metrics.jsonl", RUN_FOLDER


def run_recipe(out: str | Path) -> Recipe:
    """Configuration of the run in ``out``. Raises ``InputError`` if there is none."""
    path = Path(out) / CONFIG
    if not path.is_file():
        raise InputError(f"{out} holds no run: {path} does not exist")
    return load_recipe(path)


def load_generator(
    folder: str | Path, *, checkpoint: str = "best", device: torch.device | str = "cpu"
) -> tuple[Generator, int | None]:
    """Load the generator of a run, its moving average, or one that ``save_pretrained`` wrote.

    Args:
        folder: of the run, or with ``config.json`` and ``model.safetensors``.
        checkpoint: of a run: "best" by its scores (the last if none was kept), or "last".
        device: where to put it.

    Returns:
        The generator in eval mode, and the steps that it was trained for if known.

    Raises:
        InputError: there is neither, or it cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds neither a run (config.yaml) nor a saved generator (config.json)")
        return Generator.from_pretrained(folder, device=device), None
    if checkpoint not in ("best", "last"):
        raise InputError(f"checkpoint must be 'best' or 'last', got {checkpoint!r}")
    path = folder / "checkpoints" / (BEST if checkpoint == "best" else LAST)
    path = path if path.exists() else path.with_name(LAST)
    state = read_checkpoint(path)
    try:
        generator = Generator.from_description(state["generator"])
        generator.load_state_dict(state["trainer"]["ema"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not hold a generator: {' '.join(str(error).split())[:200]}") from error
    return generator.to(device).eval(), int(state["trainer"]["step"])
