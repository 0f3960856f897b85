"""Samples of a run or a saved generator, as one picture or as many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan._files import write_bytes
from fastgan.data import as_float, sketches_of
from fastgan.data.folders import read_images
from fastgan.data.image_sources import find_images
from fastgan.models import Generator
from fastgan.training.pictures import grid_png, png_bytes, to_pixels
from fastgan.training.reports import MAX_ROWS, scale_of
from fastgan.training.run import CONFIG, load_data_of, load_generator, run_recipe
from fastgan.training.sampling import interpolate, sample


@dataclass(frozen=True)
class SampleOptions:
    """What ``fastgan sample`` is asked for; see its help."""

    n: int | None = None
    label: int | None = None
    columns: int = 8
    truncation: float | None = None
    interpolate: bool = False
    sketches: Path | None = None
    seed: int = 0
    checkpoint: str = "best"
    device: str = "cpu"


def write_samples(source: Path, out: Path, options: SampleOptions) -> str:
    """Write a grid to the file ``out``, or with ``options.n`` single images into the folder ``out``.

    Returns:
        A line that says what was written.

    Raises:
        InputError: there is no generator in ``source``, or an option does not fit it; nothing has been written then.
    """
    generator, _ = load_generator(source, checkpoint=options.checkpoint, device=options.device)
    try:
        _check(generator, options)
        if options.n is None:
            write_bytes(out, _grid(source, generator, options))
            return f"wrote {out}"
        _write_folder(source, generator, out, options)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    return f"wrote {options.n} images to {out}"


def _check(generator: Generator, options: SampleOptions) -> None:
    if options.label is not None and not generator.n_classes:
        raise InputError("--class must not be given: the generator is unconditional")
    if options.label is not None and not 0 <= options.label < generator.n_classes:
        raise InputError(f"--class must be in [0, {generator.n_classes}), got {options.label}")
    if options.interpolate and options.n is not None:
        raise InputError("--interpolate makes a grid: it goes without -n")
    if options.sketches is not None and not generator.sketch_channels:
        raise InputError("--sketches must not be given: the generator starts from noise")
    if generator.sketch_channels and (options.truncation is not None or options.interpolate):
        raise InputError("--truncation and --interpolate need noise: this generator starts from sketches")


def _labels(generator: Generator, n: int, options: SampleOptions) -> Tensor:
    """The class asked for, or all in turn."""
    if options.label is not None:
        return torch.full((n,), options.label)
    return torch.arange(n) % max(generator.n_classes, 1)


def _grid(source: Path, generator: Generator, options: SampleOptions) -> bytes:
    """A row a class, or 8 rows of the one class asked for or of an unconditional generator."""
    one_kind = options.label is not None or generator.n_classes < 2
    rows = 8 if one_kind else min(generator.n_classes, MAX_ROWS)
    labels = _labels(generator, rows, options)
    if options.interpolate:
        images = interpolate(generator, labels, options.columns, seed=options.seed, truncation=options.truncation)
        return grid_png(images, options.columns, scale=scale_of(images))
    labels = labels.repeat_interleave(options.columns)
    sketches = None
    if generator.sketch_channels:
        labels = labels[::2]
        sketches, labels = _sketches(source, generator, labels, options)
    images = sample(generator, labels, seed=options.seed, truncation=options.truncation, sketches=sketches).cpu()
    if sketches is not None:
        images = torch.stack([sketches.expand_as(images), images], 1).flatten(0, 1)
    return grid_png(images, options.columns, scale=scale_of(images))


def _write_folder(source: Path, generator: Generator, out: Path, options: SampleOptions) -> None:
    assert options.n is not None
    labels, sketches = _labels(generator, options.n, options), None
    if generator.sketch_channels:
        sketches, labels = _sketches(source, generator, labels, options)
    images = sample(generator, labels, seed=options.seed, truncation=options.truncation, sketches=sketches)
    for i, pixels in enumerate(to_pixels(images)):
        write_bytes(out / f"{i:06d}.png", png_bytes(pixels))


def _sketches(source: Path, generator: Generator, labels: Tensor, options: SampleOptions) -> tuple[Tensor, Tensor]:
    """A sketch for each label: from the folder given, in turn; or from the run's held-out images, of that class."""
    if options.sketches is not None:
        paths = find_images(options.sketches)
        drawn = as_float(read_images(paths, generator.resolution, generator.sketch_channels))
        return drawn[torch.arange(len(labels)) % len(drawn)], labels
    if not (source / CONFIG).is_file():
        raise InputError("--sketches must be given: this generator starts from sketches, and the folder is no run")
    recipe = run_recipe(source)
    held_out = load_data_of(recipe).held_out
    drawn, classes = sketches_of(held_out, recipe.data.sketches), held_out.labels
    chosen: list[int] = []
    seen: dict[int, int] = {}
    for label in labels.tolist():
        members = torch.nonzero(classes == label).squeeze(1)
        if not len(members):
            raise InputError(f"the run's held-out images have none of class {label} to take a sketch of")
        seen[label] = seen.get(label, -1) + 1
        chosen.append(int(members[seen[label] % len(members)]))
    return drawn[torch.tensor(chosen)], labels
