"""Images from folders: a heap, one folder a class, or images and sketches side by side.

Every image is cropped to its central square and resized to the resolution wanted (bicubic, antialiased), held as uint8
in memory: 100,000 of 64x64 in colour take 1.2 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.decode import load_ahead, read_image
from fastgan.data.image_sources import find_images
from fastgan.data.images import LabelledImages

IMAGES, SKETCHES = "images", "sketches"
_NAMED = 5  # files listed in a message


def image_folder(folder: str | Path, resolution: int, channels: int = 3) -> LabelledImages:
    """The images under ``folder``. Where it has subfolders and no images beside them, each subfolder is a class, in the
    order of their names; otherwise all images are of one class.

    Args:
        folder: searched recursively.
        resolution: height and width to crop and resize to.
        channels: 3 for RGB, 1 for grey.

    Raises:
        InputError: no folder, no images in it or in one of its classes, or a file that cannot be read.
    """
    root = Path(folder)
    names, paths, labels = _classified(root)
    return LabelledImages(
        read_images(paths, resolution, channels), torch.tensor(labels), n_classes=max(len(names), 1), class_names=names
    )


def sketch_folder(folder: str | Path, resolution: int, channels: int = 3, *, paired: bool) -> LabelledImages:
    """Images and their sketches: ``folder/images`` and ``folder/sketches``, each a heap or one folder a class.

    Args:
        folder: holds both.
        resolution: height and width to crop and resize to.
        channels: of the images; sketches are grey.
        paired: sketch ``sketches/a/7.png`` belongs to image ``images/a/7.jpg``, and each has its partner. Unpaired
            sketches are matched to images by class alone.

    Raises:
        InputError: a folder is missing or empty, an image or a sketch has no partner (it is named), or the two sides
            differ in their classes.
    """
    root = Path(folder)
    for part in (IMAGES, SKETCHES):
        if not (root / part).is_dir():
            raise InputError(f"{root} must hold the folders {IMAGES} and {SKETCHES}, {part} is missing")
    names, paths, labels = _classified(root / IMAGES)
    sketch_names, sketch_paths, sketch_labels = _classified(root / SKETCHES)
    if names != sketch_names:
        raise InputError(
            f"{root / SKETCHES} must have the classes of {root / IMAGES}, "
            f"{', '.join(names) or 'none'}, got {', '.join(sketch_names) or 'none'}"
        )
    if paired:
        sketch_paths = _partners(root, paths, sketch_paths)
    return LabelledImages(
        read_images(paths, resolution, channels),
        torch.tensor(labels),
        n_classes=max(len(names), 1),
        sketches=read_images(sketch_paths, resolution, 1),
        sketch_labels=None if paired else torch.tensor(sketch_labels),
        class_names=names,
    )


def has_sketches(folder: str | Path) -> bool:
    """True for a folder that :func:`sketch_folder` reads."""
    return all((Path(folder) / part).is_dir() for part in (IMAGES, SKETCHES))


def read_images(paths: Sequence[Path], resolution: int, channels: int) -> Tensor:
    """Decode, crop and resize files to uint8 (n, channels, resolution, resolution).

    Raises:
        InputError: a file cannot be read; it is named.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    images = torch.empty(len(paths), channels, resolution, resolution, dtype=torch.uint8)

    def load(i: int) -> None:
        image = Image.fromarray(read_image(paths[i]))
        if channels == 1:
            image = image.convert("L")
        square = np.array(ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.BICUBIC))
        images[i] = torch.from_numpy(square[None] if channels == 1 else square.transpose(2, 0, 1))

    for _, result in load_ahead(load, range(len(paths)), None, ahead=len(paths)):
        result()
    return images


def _classified(root: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Class names (none for a heap), paths and labels of the images under ``root``."""
    paths = find_images(root)
    if any(path.parent == root for path in paths):
        return (), paths, [0] * len(paths)
    names = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    labels = [names.index(path.relative_to(root).parts[0]) for path in paths]
    empty = sorted(set(range(len(names))) - set(labels))
    if empty:
        raise InputError(f"{root / names[empty[0]]} holds no images: every subfolder is a class and must have some")
    return names, paths, labels


def _partners(root: Path, paths: list[Path], sketch_paths: list[Path]) -> list[Path]:
    """The sketch of each image, by the path without its suffix."""
    images = {path.relative_to(root / IMAGES).with_suffix(""): path for path in paths}
    sketches = {path.relative_to(root / SKETCHES).with_suffix(""): path for path in sketch_paths}
    for kind, others, lonely in (
        ("images", "sketch", sorted(images.keys() - sketches.keys())),
        ("sketches", "image", sorted(sketches.keys() - images.keys())),
    ):
        if lonely:
            listed = ", ".join(map(str, lonely[:_NAMED])) + (", ..." if len(lonely) > _NAMED else "")
            raise InputError(f"{root}: {len(lonely)} {kind} have no {others} of the same name: {listed}")
    return [sketches[path.relative_to(root / IMAGES).with_suffix("")] for path in paths]
