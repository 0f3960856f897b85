"""TensorBoard and Weights & Biases, where a recipe asks for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastgan._checks import InputError
from fastgan.recipes.schema import Recipe
from fastgan.training.reports import Writer


def make_writers(recipe: Recipe, out: Path) -> list[Writer]:
    """The writers that ``recipe.log`` names.

    Raises:
        InputError: a package that one needs is missing.
    """
    writers = []
    if recipe.log.tensorboard:
        writers.append(_tensorboard(out))
    if recipe.log.wandb:
        writers.append(_wandb(recipe, out))
    return writers


def _tensorboard(out: Path) -> Writer:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("log.tensorboard needs tensorboard: pip install 'fastgan[tensorboard]'") from error
    board = SummaryWriter(str(out / "tensorboard"))

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.flush()

    return write


def _wandb(recipe: Recipe, out: Path) -> Writer:
    try:
        import wandb
    except ImportError as error:
        raise InputError("log.wandb needs wandb: pip install 'fastgan[wandb]'") from error
    out.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project="fastgan", name=out.name, dir=str(out), config=dataclasses.asdict(recipe))

    def write(step: int, values: dict[str, float]) -> None:
        run.log(values, step=step)

    return write
