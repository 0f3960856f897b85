"""Images from folders and archives: a heap, one folder per class, or images and sketches side by side.

:func:`fastgan.data.archives.open_images` decides which files count, for training as for the metrics. Every image is
cropped to its central square and resized to the resolution wanted (bicubic, antialiased), held as uint8 in memory:
100,000 of 64x64 in color take 1.2 GB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.archives import open_images
from fastgan.data.decode import Decoding, load_ahead, read_image
from fastgan.data.image_sources import ImageFolder, ImageSource
from fastgan.data.images import LabeledImages
from fastgan.data.label_files import read_label_file

IMAGES, SKETCHES = "images", "sketches"
FITS = ("crop", "pad", "stretch")
WHITE = (255, 255, 255)
FOR_TRAINING = Decoding(background=WHITE, orient=True)
_log = logging.getLogger(__name__)
_NAMED = 5  # files listed in a message


def image_folder(
    source: str | Path,
    resolution: int,
    channels: int = 3,
    *,
    skip_bad: bool = False,
    decoding: Decoding = FOR_TRAINING,
    fit: str = "crop",
    tell: Callable[[str], None] = _log.warning,
) -> LabeledImages:
    """Read the images of ``source`` with their labels.

    In a folder or an archive each top folder is a class if no image lies beside them; otherwise all images form one
    class. A ``dataset.json`` or ``labels.csv`` at the top takes precedence over the folders.

    Args:
        source: a folder, searched recursively, a zip file, or a file of an array, with ``labels`` if it is an npz.
        resolution: height and width to crop and resize to.
        channels: 3 for RGB, 1 for gray.
        skip_bad: leave out images that cannot be read, rather than stop at the first.
        decoding: how files become RGB: by default composited on white and turned as their EXIF orientation says.
        fit: how images become square: "crop" to the center, "pad" with the background, or "stretch".
        tell: called with one line if anything was left out, with counts.

    Raises:
        InputError: no such source, no images in it or in one of its classes, or a file that cannot be read.

    Example:
        >>> from torchvision.utils import save_image
        >>> save_image(torch.rand(3, 20, 20), "a.png")
        >>> image_folder(".", 16).images.shape
        torch.Size([1, 3, 16, 16])
    """
    images = open_images(source, skip_bad=skip_bad)
    images.decoding = decoding
    classes = read_label_file(source, images) or images.classes()
    return labeled(images, classes, resolution, channels, fit=fit, tell=tell)


def labeled(
    images: ImageSource,
    classes: tuple[tuple[str, ...], list[int]],
    resolution: int,
    channels: int,
    *,
    fit: str,
    tell: Callable[[str], None],
) -> LabeledImages:
    """Read all of ``images``, whose ``classes`` are names and the class of each image; see :func:`image_folder`."""
    names, labels = classes
    pixels, kept = read_source(images, resolution, channels, fit=fit)
    _tell_left_out(images, tell)
    return LabeledImages(pixels[kept], torch.tensor(labels)[kept], n_classes=max(len(names), 1), class_names=names)


def sketch_folder(
    folder: str | Path,
    resolution: int,
    channels: int = 3,
    *,
    paired: bool,
    skip_bad: bool = False,
    decoding: Decoding = FOR_TRAINING,
    fit: str = "crop",
    tell: Callable[[str], None] = _log.warning,
) -> LabeledImages:
    """Read images and their sketches: ``folder/images`` and ``folder/sketches``, each a heap or one folder per class.

    Args:
        folder: holds both.
        resolution: height and width to crop and resize to.
        channels: of the images; sketches are gray.
        paired: sketch ``sketches/a/7.png`` belongs to image ``images/a/7.jpg``, and each has its partner. Unpaired
            sketches are matched to images by class alone.
        skip_bad: leave out files that cannot be read, of pairs both, rather than stop at the first.
        decoding, fit, tell: as for :func:`image_folder`.

    Raises:
        InputError: a folder is missing or empty, an image or a sketch has no partner (it is named), or the two sides
            differ in their classes.

    Example:
        >>> from pathlib import Path
        >>> from torchvision.utils import save_image
        >>> for name in ("images", "sketches"):
        ...     Path(name).mkdir()
        ...     save_image(torch.rand(3, 20, 20), f"{name}/a.png")
        >>> sketch_folder(".", 16, paired=True).sketches.shape
        torch.Size([1, 1, 16, 16])
    """
    root = Path(folder)
    for part in (IMAGES, SKETCHES):
        if not (root / part).is_dir():
            raise InputError(f"{root} must hold the folders {IMAGES} and {SKETCHES}, {part} is missing")
    images, sketches = (ImageFolder(root / part, skip_bad=skip_bad) for part in (IMAGES, SKETCHES))
    images.decoding = sketches.decoding = decoding
    (names, labels), (sketch_names, sketch_labels) = images.classes(), sketches.classes()
    if names != sketch_names:
        raise InputError(
            f"{root / SKETCHES} must have the classes of {root / IMAGES}, "
            f"{', '.join(names) or 'none'}, got {', '.join(sketch_names) or 'none'}"
        )
    order = _partners(root, images, sketches) if paired else range(len(sketches))
    pixels, kept = read_source(images, resolution, channels, fit=fit)
    drawn, sketches_kept = read_source(sketches, resolution, 1, order, fit=fit)
    if paired:
        kept = sketches_kept = kept & sketches_kept
    for source in (images, sketches):
        _tell_left_out(source, tell)
    return LabeledImages(
        pixels[kept],
        torch.tensor(labels)[kept],
        n_classes=max(len(names), 1),
        sketches=drawn[sketches_kept],
        sketch_labels=None if paired else torch.tensor(sketch_labels)[sketches_kept],
        class_names=names,
    )


def has_sketches(folder: str | Path) -> bool:
    """Return whether :func:`sketch_folder` can read ``folder``."""
    return all((Path(folder) / part).is_dir() for part in (IMAGES, SKETCHES))


def read_images(paths: Sequence[Path], resolution: int, channels: int) -> Tensor:
    """Decode, crop and resize files to uint8 (n, channels, resolution, resolution).

    Raises:
        InputError: a file cannot be read; it is named.
    """
    return _read(lambda i: read_image(paths[i], FOR_TRAINING), len(paths), resolution, channels, False)[0]


def read_source(
    source: ImageSource,
    resolution: int,
    channels: int,
    order: Sequence[int] | None = None,
    *,
    fit: str = "crop",
) -> tuple[Tensor, Tensor]:
    """Read images as :func:`read_images` does, in ``order`` if given.

    Returns:
        The images, and which of them could be read, bool (n,). The names of the others are added to ``source.skipped``.

    Raises:
        InputError: an image cannot be read, unless the source skips bad ones, or none can.
    """
    order = range(len(source)) if order is None else order
    pixels, bad = _read(
        lambda i: source.read(order[i]),
        len(order),
        resolution,
        channels,
        source.skip_bad,
        fit,
        source.decoding.background or WHITE,
    )
    source.skipped += [source.name(order[i]) for i in bad]
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[bad] = False
    if not kept.any():
        raise InputError(f"{source.label} holds no image that can be read")
    return pixels, kept


def _read(
    read: Callable[[int], np.ndarray],
    n: int,
    resolution: int,
    channels: int,
    skip_bad: bool,
    fit: str = "crop",
    background: tuple[int, ...] = WHITE,
) -> tuple[Tensor, list[int]]:
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(map(repr, FITS))}, got {fit!r}")
    images = torch.zeros(n, channels, resolution, resolution, dtype=torch.uint8)
    size, bicubic = (resolution, resolution), Image.Resampling.BICUBIC

    def load(i: int) -> None:
        pixels = read(i)
        image = Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.round().astype(np.uint8))
        if fit == "crop":
            image = ImageOps.fit(image, size, method=bicubic)
        elif fit == "pad":
            image = ImageOps.pad(image, size, method=bicubic, color=background)
        else:
            image = image.resize(size, bicubic)
        square = np.array(image.convert("L") if channels == 1 else image)
        images[i] = torch.from_numpy(square[None] if channels == 1 else square.transpose(2, 0, 1))

    bad = []
    for i, result in load_ahead(load, range(n), None, ahead=n):
        try:
            result()
        except InputError:
            if not skip_bad:
                raise
            bad.append(i)
    return images, bad


def _tell_left_out(source: ImageSource, tell: Callable[[str], None]) -> None:
    if line := source.left_out_line():
        tell(f"{source.label}: left out {line}")


def are_paired(folder: str | Path) -> bool:
    """Return whether images and sketches of ``folder`` correspond one to one by name."""
    stems = [
        {path.with_suffix("") for path in ImageFolder(Path(folder) / part).relative_paths}
        for part in (IMAGES, SKETCHES)
    ]
    return stems[0] == stems[1]


def _partners(root: Path, images: ImageFolder, sketches: ImageFolder) -> list[int]:
    """Index of each image's sketch, by the path without its suffix."""
    of_images, of_sketches = (
        {path.with_suffix(""): i for i, path in enumerate(source.relative_paths)} for source in (images, sketches)
    )
    for kind, others, lonely in (
        ("images", "sketch", sorted(of_images.keys() - of_sketches.keys())),
        ("sketches", "image", sorted(of_sketches.keys() - of_images.keys())),
    ):
        if lonely:
            listed = ", ".join(map(str, lonely[:_NAMED])) + (", ..." if len(lonely) > _NAMED else "")
            raise InputError(f"{root}: {len(lonely)} {kind} have no {others} of the same name: {listed}")
    return [of_sketches[path.with_suffix("")] for path in images.relative_paths]
