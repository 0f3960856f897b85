"""Samples of a run or a saved generator, as one picture or as many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan._files import check_writable, write_bytes
from fastgan.data import as_float, sketches_of
from fastgan.data.find import is_image
from fastgan.data.folders import read_images
from fastgan.data.image_sources import find_images
from fastgan.models import Generator
from fastgan.training.pictures import FORMATS, encoded, grid_picture, to_pixels
from fastgan.training.reports import MAX_ROWS
from fastgan.training.run_data import load_run_data
from fastgan.training.run_folder import CONFIG, load_generator, run_recipe
from fastgan.training.sampling import held_out_index, interpolate, sample

_SAMPLES = "[0-9]" * 6 + ".png"


@dataclass(frozen=True)
class SampleOptions:
    """Options of ``fastgan sample``; see its help."""

    n: int | None = None
    label: str | None = None
    columns: int = 8
    truncation: float | None = None
    interpolate: bool = False
    sketches: Path | None = None
    seed: int = 0
    checkpoint: str = "best"
    device: str = "cpu"
    by_class: bool = False
    overwrite: bool = False


def write_samples(source: Path, out: Path, options: SampleOptions) -> str:
    """Write a grid to the file ``out``, or with ``options.n`` single images into the folder ``out``.

    A grid has one row per class, or 8 rows for one class or an unconditional generator; its format follows from the
    extension of ``out``. Single images are PNG files of all classes in turn, in one folder or one per class.

    Returns:
        A line that says what was written.

    Raises:
        InputError: there is no generator in ``source``, or an option does not fit it; nothing has been written then.
    """
    generator, _ = load_generator(source, checkpoint=options.checkpoint, device=options.device)
    label = _check(generator, out, options)
    n, n_classes = options.n, generator.n_classes
    noise: dict[str, Any] = {"seed": options.seed, "truncation": options.truncation}
    rows = 8 if label is not None or n_classes < 2 else min(n_classes, MAX_ROWS)
    count = rows if n is None else n
    labels = torch.arange(count) % max(n_classes, 1) if label is None else torch.full((count,), label)
    names = generator.class_names if label is None and n_classes > 1 else ()
    sketches = None
    try:
        if options.interpolate:
            images = interpolate(generator, labels, options.columns, **noise)
        else:
            if n is None:
                labels = labels.repeat_interleave(options.columns)
                labels = labels[::2] if generator.sketch_channels else labels
            if generator.sketch_channels:
                sketches = _sketches(source, generator, labels, options)
            images = sample(generator, labels, sketches=sketches, **noise)
        if n is None:
            picture: dict[str, Any] = {"format": FORMATS[_extension(out)], "row_names": names[:rows]}
            write_bytes(out, grid_picture(images, options.columns, sketches=sketches, **picture))
            return f"wrote {out}"
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    if options.overwrite and out.exists():
        for path in [*out.rglob(_SAMPLES)]:
            path.unlink()
    for i, (pixels, own) in enumerate(zip(to_pixels(images), labels.tolist(), strict=True)):
        name = generator.class_names[own] if generator.class_names else str(own)
        folder = out / name.replace("/", "_") if options.by_class else out
        write_bytes(folder / f"{i:06d}.png", encoded(pixels))
    return f"wrote {n} images to {out}"


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _check(generator: Generator, out: Path, options: SampleOptions) -> int | None:
    """The label that ``options`` ask for, None for all."""
    if options.label is not None and not generator.n_classes:
        raise InputError("--class must not be given: the generator is unconditional")
    try:
        label = None if options.label is None else generator.label_of(options.label)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    if options.by_class and (options.n is None or not generator.n_classes):
        raise InputError("--by-class needs -n and a conditional generator")
    if options.n is not None and out.is_dir() and any(out.iterdir()) and not options.overwrite:
        raise InputError(f"{out} must be empty or new; --overwrite removes the samples in it first")
    if options.n is not None and options.overwrite:
        others = sorted(path for path in out.rglob("*") if is_image(path) and not path.match(_SAMPLES))
        if others:
            raise InputError(f"{out} must hold no images but samples, it holds {others[0].relative_to(out)}")
    if options.interpolate and options.n is not None:
        raise InputError("--interpolate makes a grid and cannot be combined with -n")
    if options.sketches is not None and not generator.sketch_channels:
        raise InputError("--sketches must not be given: the generator starts from noise")
    if generator.sketch_channels and (options.truncation is not None or options.interpolate):
        raise InputError("--truncation and --interpolate need noise: this generator starts from sketches")
    if options.n is None and _extension(out) not in FORMATS:
        raise InputError(f"--out must end in {', '.join(f'.{name}' for name in FORMATS)}, got {out}; -n takes a folder")
    check_writable(out.parent if options.n is None else out)
    return label


def _sketches(source: Path, generator: Generator, labels: Tensor, options: SampleOptions) -> Tensor:
    """One sketch per label: from the given folder, in turn, or from the run's held-out images of that class."""
    if options.sketches is not None:
        paths = find_images(options.sketches)
        drawn = as_float(read_images(paths, generator.resolution, generator.sketch_channels))
        return drawn[torch.arange(len(labels)) % len(drawn)]
    if not (source / CONFIG).is_file():
        raise InputError("--sketches must be given: this generator starts from sketches, and the folder is not a run's")
    recipe = run_recipe(source)
    held_out = load_run_data(source, recipe).held_out
    return sketches_of(held_out, recipe.data.sketches)[held_out_index(held_out, labels)]
