"""The images of a run: loaded as its recipe says, checked against it, and the settings that follow from them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgan._checks import InputError
from fastgan.data import DataSplit, load_data
from fastgan.data.datasets import is_named
from fastgan.data.decode import Decoding
from fastgan.data.images import mostly_color
from fastgan.distributed import World
from fastgan.recipes import Recipe, automatic, override_values
from fastgan.training.data_record import DataRecord

_log = logging.getLogger(__name__)


def load_data_of(recipe: Recipe, world: World | None = None, tell: Callable[[str], None] = _log.warning) -> DataSplit:
    """Load the images that a recipe names, at its resolution. Raises ``InputError`` as ``load_data``.

    With several processes, the first one loads before the others, so that only it downloads.
    """
    data, world = recipe.data, world or World()
    loaded: list[DataSplit] = []
    for turn in (world.is_first, not world.is_first):
        with world.agreed():
            if turn:
                how: dict[str, Any] = {
                    name: getattr(data, name) for name in ("channels", "sketches", "held_out", "skip_bad", "fit")
                }
                decoding = Decoding(data.background, orient=True, value_range=data.value_range)
                loaded.append(load_data(data.source, recipe.model.resolution, decoding=decoding, tell=tell, **how))
    return loaded[0]


def load_run_data(out: str | Path, recipe: Recipe, world: World | None = None) -> DataSplit:
    """Load the data of the run in ``out``, and compare its files with those recorded.

    Raises:
        InputError: as ``load_data``, or the files differ.
    """
    source = recipe.data.source
    if not is_named(source) and not Path(source).exists():
        raise InputError(f"{source}, the data of {out}, does not exist: give the new place of the same files by --data")
    data = load_data_of(recipe, world)
    record = DataRecord.read(out)
    if record is not None:
        record.check(data, source, out)
    return data


def settle(recipe: Recipe, data: DataSplit) -> Recipe:
    """Replace each "auto" of ``recipe`` by the value that follows from the data."""
    decided = {
        "data.flip": mostly_color(data.train.images),
        "data.sketches": data.sketches,
        "model.resolution": data.train.images.shape[-1],
        "model.sees_sketch": data.sketches in ("edges", "paired"),
    }
    return override_values(recipe, {key: decided[key] for key in automatic(recipe)})


def check_classes(recipe: Recipe, data: DataSplit) -> None:
    """Raise ``InputError`` for a conditional recipe on one class, except for one from sketches."""
    model = recipe.model
    if not model.conditional or model.architecture == "sketch" or data.train.n_classes > 1:
        return
    unconditional = "model.conditional=false" if model.head in ("plain", "projection") else "a recipe such as dcgan"
    raise InputError(
        f"recipe {recipe.name} needs at least two classes, {recipe.data.source} has one: make each class a folder, or "
        f"take {unconditional} for images without classes" + "".join(f" ({note})" for note in data.notes)
    )


def describe_use(recipe: Recipe, data: DataSplit) -> str:
    """Describe how the run uses its data, including all settings that follow from the data."""
    size = recipe.model.resolution
    parts = [f"{len(data.train)} to train on, {len(data.held_out)} held out, at {size}x{size}"]
    parts += ["mirrored at random"] if recipe.data.flip else ["not mirrored"]
    if recipe.model.architecture == "sketch":
        sees = ", which the discriminator sees" if recipe.model.sees_sketch else ", which only the generator sees"
        kind = {"edges": "edge maps as sketches", "paired": "each with its sketch", "unpaired": "sketches of the class"}
        parts.append(kind.get(recipe.data.sketches, "no sketches") + sees)
    return "; ".join(parts)
