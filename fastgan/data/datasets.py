"""Data sets by name or folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from fastgan._checks import InputError
from fastgan.data.fingerprint import fingerprint_files
from fastgan.data.folders import has_sketches, image_folder, sketch_folder
from fastgan.data.image_sources import find_images
from fastgan.data.images import LabelledImages, stratified_split

_log = logging.getLogger(__name__)
NAMED = ("digits", "cifar10")


@dataclass(frozen=True)
class DataSplit:
    """Images to train on and images that no network sees in training, to score against.

    Attributes:
        files: CRC-32 of each file of a folder, by its path below it.
        found: description of both parts together.
    """

    train: LabelledImages
    held_out: LabelledImages
    files: Mapping[str, str] = field(default_factory=dict)
    found: str = ""


def load_data(
    source: str | Path,
    resolution: int,
    *,
    channels: int = 0,
    sketches: str = "none",
    held_out: float = 0.1,
    skip_bad: bool = False,
    tell: Callable[[str], None] = _log.warning,
) -> DataSplit:
    """Load a data set of :data:`NAMED`, or a folder or file as :mod:`fastgan.data.folders` reads it.

    Args:
        source: "digits", "cifar10" (downloaded once by torchvision into ``~/.cache/fastgan``), a folder, a zip file or
            an npz, npy or pt of images.
        resolution: height and width wanted.
        channels: 1 for grey, 3 for RGB, 0 for what the data has (folders: 3).
        sketches: as in :class:`fastgan.data.DeviceLoader`; "paired" and "unpaired" need a folder with sketches.
        held_out: the part of a folder's images to score against, of each class; digits hold out a third, CIFAR-10 its
            test images.
        skip_bad: leave out images that cannot be read, rather than stop at the first.
        tell: called with one line, with counts, if files were left out; by default it is logged.

    Raises:
        InputError: there is no such data, or it has not what is asked for.
    """
    wants_sketches = sketches in ("paired", "unpaired")
    if str(source) in NAMED and wants_sketches:
        raise InputError(f"data {source} has no sketches: sketches must be 'edges' or 'none', got {sketches!r}")
    try:
        if str(source) == "digits":
            repeats = (1, 3 if channels == 3 else 1, 1, 1)
            train, test = (replace(part, images=part.images.repeat(repeats)) for part in digits(resolution))
            return DataSplit(train, test)
        if str(source) == "cifar10":
            return _cifar10(resolution, channels)
    except ImportError as error:
        raise InputError(str(error)) from error
    folder = Path(source)
    if not folder.exists():
        raise InputError(f"data must be one of {', '.join(NAMED)} or a folder; {folder} does not exist")
    if wants_sketches:
        paired = sketches == "paired"
        whole = sketch_folder(folder, resolution, channels or 3, paired=paired, skip_bad=skip_bad, tell=tell)
    else:
        images = folder / "images" if has_sketches(folder) else folder
        whole = image_folder(images, resolution, channels or 3, skip_bad=skip_bad, tell=tell)
    try:
        files = fingerprint_files(folder, find_images(folder)) if folder.is_dir() else {}
        train, test = stratified_split(whole, held_out=held_out)
        return DataSplit(train, test, files)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error


def digits(resolution: int = 32, *, held_out: float = 1 / 3, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """The 1797 handwritten 8x8 grey digits inside scikit-learn's wheel, up-sampled; no download.

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
    grey = torch.from_numpy(bunch.images).float()[:, None] / 16  # the wheel's range is 0 to 16
    if resolution != grey.shape[-1]:
        grey = F.interpolate(grey, size=(resolution, resolution), mode="bicubic", antialias=True)
    images = grey.clamp_(0, 1) * 2 - 1
    whole = LabelledImages(images, torch.from_numpy(bunch.target).long(), n_classes=10)
    return stratified_split(whole, held_out=held_out, seed=seed)


def _cifar10(resolution: int, channels: int) -> DataSplit:
    from torchvision.datasets import CIFAR10
    from torchvision.transforms.v2.functional import resize

    if channels == 1:
        raise InputError("cifar10 is in colour: channels must be 0 or 3, got 1")
    root = Path.home() / ".cache" / "fastgan" / "cifar10"
    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"CIFAR-10 is not under {root} and cannot be downloaded ({error}): put cifar-10-python.tar.gz there"
        ) from error
    sets = []
    for part in parts:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        if images.shape[-1] != resolution:
            images = torch.cat([resize(some, [resolution, resolution], antialias=True) for some in images.split(1000)])
        names = tuple(part.classes)
        sets.append(LabelledImages(images, torch.tensor(part.targets), n_classes=10, class_names=names))
    return DataSplit(sets[0], sets[1])
