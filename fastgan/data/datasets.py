"""Data sets by name or folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.nn import functional as F

from fastgan._checks import InputError
from fastgan.data.archives import ImageArray, open_images
from fastgan.data.decode import Decoding
from fastgan.data.fingerprint import fingerprint_files
from fastgan.data.folders import (
    FOR_TRAINING,
    IMAGES,
    SKETCHES,
    are_paired,
    has_sketches,
    image_folder,
    labeled,
    sketch_folder,
)
from fastgan.data.image_sources import ImageFolder, ImageSource
from fastgan.data.images import LabeledImages, stratified_split
from fastgan.data.libraries import PREFIXES, open_library
from fastgan.data.photographs import photos
from fastgan.data.survey import Survey, survey

_log = logging.getLogger(__name__)
NAMED = ("digits", "photos", "cifar10")


def is_named(source: str | Path) -> bool:
    """Return whether ``source`` is one of :data:`NAMED`, "photos:5000" (a number of crops), or a library's data set."""
    name, _, rest = str(source).partition(":")
    if name in PREFIXES:
        return bool(rest)
    return name in NAMED and (not rest or (name == "photos" and rest.isdecimal()))


@dataclass(frozen=True)
class DataSplit:
    """Images to train on and images that no network sees in training, to score against.

    Attributes:
        files: CRC-32 of each file of a folder or archive, by its path below it.
        found: description of both parts together, such as "48 images 64x64 RGB, 4 classes: cat 12, dog 12, ...".
        notes: what a user should know about them, one sentence each.
        sketches: where sketches come from, as in :class:`fastgan.data.DeviceLoader`.

    Example:
        >>> data = LabeledImages(torch.rand(20, 3, 8, 8) * 2 - 1, torch.arange(20) % 2, n_classes=2)
        >>> split = DataSplit(*stratified_split(data, held_out=0.2))
        >>> len(split.train), len(split.held_out)
        (16, 4)
    """

    train: LabeledImages
    held_out: LabeledImages
    files: Mapping[str, str] = field(default_factory=dict)
    found: str = ""
    notes: tuple[str, ...] = ()
    sketches: str = "none"


def load_data(
    source: str | Path,
    resolution: int | None,
    *,
    channels: int = 0,
    sketches: str = "none",
    held_out: float = 0.1,
    skip_bad: bool = False,
    decoding: Decoding = FOR_TRAINING,
    fit: str = "crop",
    tell: Callable[[str], None] = _log.warning,
) -> DataSplit:
    """Load a data set of :data:`NAMED`, or a folder or file as :mod:`fastgan.data.folders` reads it.

    Args:
        source: "digits"; "photos", or "photos:5000" for so many training crops; "cifar10", "torchvision:NAME" or
            "huggingface:NAME", as :func:`fastgan.data.libraries.open_library` takes them; a folder, a zip or tar file,
            or an npz, npy, pt or HDF5 file of images.
        resolution: height and width wanted; None for the power of two that the images fill, from 32 to 128.
        channels: 1 for gray, 3 for RGB, 0 for what the data has (folders: 3).
        sketches: as in :class:`fastgan.data.DeviceLoader`; "paired" and "unpaired" need a folder with sketches. "auto"
            takes a folder's sketches, paired if each image has one of its name, and edge maps if there are none.
        held_out: the part of a folder's images to score against, of each class, but 2 at least; digits hold out a
            third, photos 10,000 crops, libraries their test split if there is one.
        skip_bad: leave out images that cannot be read, rather than stop at the first.
        decoding: how files become RGB.
        fit: how images become square: "crop" to the center, "pad" with the background, or "stretch".
        tell: called with one line, with counts, if files were left out; by default it is logged.

    Raises:
        InputError: there is no such data, or it lacks what is asked for.

    Example:
        >>> split = load_data("digits", 16)
        >>> len(split.train), len(split.held_out)
        (1198, 599)
    """
    how: dict[str, Any]
    if is_named(source):
        name, _, number = str(source).partition(":")
        if sketches in ("paired", "unpaired"):
            raise InputError(f"data {source} has no sketches: sketches must be 'edges' or 'none', got {sketches!r}")
        size = 32 if resolution is None else resolution
        try:
            if name == "photos":
                split = _photos(size, channels, int(number or 20_000))
            elif name == "digits":
                split = _digits(size, channels)
            else:
                library = "torchvision:CIFAR10" if name == "cifar10" else str(source)
                how = {"skip_bad": skip_bad, "decoding": decoding, "fit": fit, "tell": tell}
                split = _of_library(library, resolution, channels, held_out, **how)
        except (ImportError, ValueError) as error:
            raise error if isinstance(error, InputError) else InputError(str(error)) from error
        return replace(split, sketches="edges" if sketches == "auto" else sketches)
    root = Path(source)
    if not root.exists():
        known = ", ".join((*NAMED, *(f"{prefix}:NAME" for prefix in PREFIXES)))
        raise InputError(f"data must be one of {known} or a folder; {root} does not exist")
    with_sketches = has_sketches(root)
    if sketches == "auto":
        sketches = "edges" if not with_sketches else "paired" if are_paired(root) else "unpaired"
    place = root / IMAGES if with_sketches else root
    images = open_images(place, skip_bad=skip_bad)
    looked = survey(images)
    if not len(looked):
        images.read(0)  # names what is wrong with it
    how = {"skip_bad": skip_bad, "decoding": decoding, "fit": fit, "tell": tell}
    where = (looked.resolution if resolution is None else resolution, channels or 3)
    if sketches in ("paired", "unpaired"):
        whole = sketch_folder(root, *where, paired=sketches == "paired", **how)
        drawings = survey(ImageFolder(root / SKETCHES))
        files = {f"{IMAGES}/{key}": value for key, value in looked.files.items()}
        files |= {f"{SKETCHES}/{key}": value for key, value in drawings.files.items()}
    else:
        whole, files = image_folder(place, *where, **how), looked.files
    if root.is_file() and not files:
        files = fingerprint_files(root.parent, [root])
    notes = [*_notes_on_classes(place, images, whole), *_notes_on_pixels(looked, decoding, fit)]
    try:
        train, test = _split(whole, held_out)
    except ValueError as error:
        raise InputError(f"{root}: {error}") from error
    notes += _notes_on_empty_classes(train)
    return DataSplit(train, test, files, looked.describe() + describe_classes(whole), tuple(notes), sketches)


_LEAST_HELD_OUT = 2
_LISTED = 12  # classes in a line
_SPLITS = {"train", "training", "trn", "val", "valid", "validation", "dev", "test", "testing", "tst"}


def describe_classes(data: LabeledImages) -> str:
    """Describe the classes, as in ", 4 classes: cat 12, dog 12, ..."; "" if there is one class without a name."""
    counts = data.labels.bincount(minlength=data.n_classes).tolist()
    if data.n_classes == 1 and not data.class_names:
        return ""
    names = data.class_names or [str(i) for i in range(data.n_classes)]
    listed = [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    more = ", ..." if len(listed) > _LISTED else ""
    plural = "class" if len(listed) == 1 else "classes"
    return f", {len(listed)} {plural}: {', '.join(listed[:_LISTED])}{more}"


def _split(whole: LabeledImages, held_out: float) -> tuple[LabeledImages, LabeledImages]:
    """Split each class alike; hold out 2 random images if that leaves too few to score against."""
    if len(whole) < 2 * _LEAST_HELD_OUT:
        raise ValueError(f"there must be at least {2 * _LEAST_HELD_OUT} images, there are {len(whole)}")
    if round(held_out * len(whole)) > _LEAST_HELD_OUT:
        try:
            train, test = stratified_split(whole, held_out=held_out)
            if len(test) >= _LEAST_HELD_OUT:
                return train, test
        except ValueError:
            if held_out > 0.5:  # nothing is left to train on; below, no class is so large that it gives an image
                raise
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    left = whole.labels.bincount().tolist()
    shared: list[int] = []
    last: list[int] = []  # images of classes without another one are held out only if there is no other way
    for index in order.tolist():
        label = int(whole.labels[index])
        (shared if left[label] > 1 else last).append(index)
        left[label] -= 1
    chosen = torch.zeros(len(whole), dtype=torch.bool)
    chosen[[*shared, *last][:_LEAST_HELD_OUT]] = True
    return whole.subset(~chosen), whole.subset(chosen)


def _notes_on_classes(place: Path, images: ImageSource, data: LabeledImages) -> list[str]:
    """List notes on folders that were not, or should not be, taken for classes.

    Raises:
        InputError: the folders look like the splits of a data set.
    """
    names = data.class_names
    if len(names) > 1 and {name.lower() for name in names} <= _SPLITS:
        raise InputError(
            f"{place} holds the folders {', '.join(names)}, which look like the splits of one data set, not like "
            f"classes: train on {place / names[0]}"
        )
    keys = [PurePosixPath(images.key(i)) for i in range(len(images))]
    stray = [key for key in keys if len(key.parts) == 1]
    folders = sorted({key.parts[0] for key in keys if len(key.parts) > 1})
    if names or not stray or not folders or isinstance(images, ImageArray):
        return []
    lie = f"{stray[0]} lies" if len(stray) == 1 else f"{stray[0]} and {len(stray) - 1} more images lie"
    listed = ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
    return [
        f"{lie} beside the folders {listed} in {place}, so all images form one class: "
        "move images without a class elsewhere, and each folder becomes a class"
    ]


def _notes_on_empty_classes(train: LabeledImages) -> list[str]:
    """List a note on classes that a generator is asked for and that no training image shows."""
    counts = train.labels.bincount(minlength=train.n_classes).tolist()
    names = train.class_names or [str(i) for i in range(train.n_classes)]
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if not empty:
        return []
    listed = ", ".join(empty[:_LISTED]) + (", ..." if len(empty) > _LISTED else "")
    return [f"{len(empty)} of {train.n_classes} classes have no image to train on: {listed}"]


def _notes_on_pixels(looked: Survey, decoding: Decoding, fit: str) -> list[str]:
    notes = []
    if looked.not_square:
        how = {"crop": "cropped to their central square", "pad": "padded to squares", "stretch": "stretched to squares"}
        others = "" if fit != "crop" else "; fit=pad or fit=stretch keeps all of them"
        notes.append(f"{looked.not_square} images are not square: they are {how[fit]}{others}")
    if looked.alpha and decoding.background is not None:
        notes.append(f"{looked.alpha} images have alpha: composited on background={[*decoding.background]}")
    if looked.turned:
        notes.append(f"{looked.turned} images are turned as their EXIF orientation says")
    if looked.deep and not decoding.value_range and looked.most <= _NARROW * 65535:
        most = int(looked.most)
        notes.append(
            f"{looked.deep} images of 16 bits reach only {most} of 65535 and are dark: "
            f"value_range=[0, {(1 << most.bit_length()) - 1}] uses all gray levels"
        )
    return notes


_NARROW = 0.3  # part of a range that leaves images dark


def digits(resolution: int = 32, *, held_out: float = 1 / 3, seed: int = 0) -> tuple[LabeledImages, LabeledImages]:
    """Load the 1797 handwritten 8x8 gray digits of scikit-learn's wheel, resized; no download.

    They are the test part of Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998.

    Args:
        resolution: height and width to resize to, bicubically.
        held_out: the part of each class to hold out, in (0, 1).
        seed: of the split.

    Returns:
        The training and the held-out images, (n, 1, resolution, resolution) float32 in [-1, 1], ten classes.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: ``resolution`` or ``held_out`` is outside its range.

    Example:
        >>> train, held_out = digits(16)
        >>> train.images.shape, len(held_out)
        (torch.Size([1198, 1, 16, 16]), 599)
    """
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits data set comes with scikit-learn, which is not installed: pip install 'fastgan[demo]'"
        ) from error
    bunch = load_digits()
    names = tuple(map(str, range(10)))
    gray = torch.from_numpy(bunch.images).float()[:, None] / 16  # the wheel's range is 0 to 16
    if resolution != gray.shape[-1]:
        gray = F.interpolate(gray, size=(resolution, resolution), mode="bicubic", antialias=True)
    images = gray.clamp_(0, 1) * 2 - 1
    whole = LabeledImages(images, torch.from_numpy(bunch.target).long(), n_classes=10, class_names=names)
    return stratified_split(whole, held_out=held_out, seed=seed)


def _digits(resolution: int, channels: int) -> DataSplit:
    repeats = (1, 3 if channels == 3 else 1, 1, 1)
    train, test = (replace(part, images=part.images.repeat(repeats)) for part in digits(resolution))
    return DataSplit(train, test, found=_described("8x8 gray", train, test))


def _described(kind: str, train: LabeledImages, test: LabeledImages) -> str:
    both = replace(train, images=torch.cat([train.images, test.images]), labels=torch.cat([train.labels, test.labels]))
    return f"{len(both)} images {kind}{describe_classes(both)}"


def _photos(resolution: int, channels: int, n: int) -> DataSplit:
    if channels == 1:
        raise InputError("photos are in color: channels must be 0 or 3, got 1")
    train, test = photos(resolution, n)
    return DataSplit(train, test, found=_described(f"{resolution}x{resolution} RGB", train, test))


def _of_library(
    source: str,
    resolution: int | None,
    channels: int,
    held_out: float,
    *,
    skip_bad: bool,
    decoding: Decoding,
    fit: str,
    tell: Callable[[str], None],
) -> DataSplit:
    parts = [part for part in open_library(source, skip_bad=skip_bad) if part is not None]
    for part in parts:
        part.decoding = decoding
    looked = survey(parts[0])
    if not len(looked):
        parts[0].read(0)  # names what is wrong with it
    size = looked.resolution if resolution is None else resolution
    channels = channels or (1 if looked.gray == len(looked) else 3)
    sets = [labeled(part, part.classes(), size, channels, fit=fit, tell=tell) for part in parts]
    train, test = sets if len(sets) == 2 else _split(sets[0], held_out)
    if test.n_classes != train.n_classes:
        raise InputError(f"{source} must have as many classes in both splits, got {train.n_classes}, {test.n_classes}")
    smallest, largest = min(looked.sizes), max(looked.sizes)
    sizes = "{}x{}".format(*smallest) + ("" if smallest == largest else " to {}x{}".format(*largest))
    found = _described(f"{sizes} {'gray' if channels == 1 else 'RGB'}", train, test)
    return DataSplit(train, test, found=found, notes=tuple(_notes_on_empty_classes(train)))
