"""Crops of ten photographs that the wheels of scikit-learn and scikit-image hold: a color data set without a download.

Each photograph is a class. A training crop and a held-out one never share a pixel: they lie in different horizontal
bands, so that even the two views of the motorcycle, which are shifted along the rows, stay apart.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from fastgan._checks import InputError
from fastgan.data.decode import read_image
from fastgan.data.images import LabeledImages

PHOTOS = {
    "astronaut": ("skimage/data/astronaut.png",),
    "chelsea": ("skimage/data/chelsea.png",),
    "china": ("sklearn/datasets/images/china.jpg",),
    "coffee": ("skimage/data/coffee.png",),
    "flower": ("sklearn/datasets/images/flower.jpg",),
    "hubble_deep_field": ("skimage/data/hubble_deep_field.jpg",),
    "ihc": ("skimage/data/ihc.png",),
    "motorcycle": ("skimage/data/motorcycle_left.png", "skimage/data/motorcycle_right.png"),
    "retina": ("skimage/data/retina.jpg",),
    "rocket": ("skimage/data/rocket.jpg",),
}
"""Classes, and their files in the two packages."""

BAND = 96  # rows; also the largest crop


def photos(
    resolution: int = 32, n_train: int = 20_000, n_test: int = 10_000, *, seed: int = 0
) -> tuple[LabeledImages, LabeledImages]:
    """Random square crops of the :data:`PHOTOS`, at the photographs' own resolution.

    Bands of 96 rows give training crops, but each second of three gives held-out ones. All classes have as many crops,
    up to one.

    Args:
        resolution: height and width of the crops, from 1 to 96.
        n_train, n_test: number of crops, at least one per class.
        seed: of their places.

    Returns:
        The training and the held-out crops, (n, 3, resolution, resolution) uint8, ten classes.

    Raises:
        ImportError: scikit-learn or scikit-image is missing.
        InputError: one of the files is not in the installed packages.
        ValueError: an argument is out of range.

    Example:
        >>> train, test = photos(32, 100, 50)  # doctest: +SKIP
        >>> train.images.shape, test.class_names[1]  # doctest: +SKIP
        (torch.Size([100, 3, 32, 32]), 'chelsea')
    """
    if not 1 <= resolution <= BAND:
        raise ValueError(f"resolution must be from 1 to {BAND} for photos, got {resolution}")
    for name, n in (("n_train", n_train), ("n_test", n_test)):
        if n < len(PHOTOS):
            raise ValueError(f"{name} must be at least {len(PHOTOS)}, one crop per photograph, got {n}")
    views = [[_read(file) for file in files] for files in PHOTOS.values()]
    rng = np.random.default_rng(seed)
    sets = []
    for n, is_test in ((n_train, False), (n_test, True)):
        crops = np.empty((n, resolution, resolution, 3), dtype=np.uint8)
        for i in range(n):
            pictures = views[i % len(views)]
            picture = pictures[rng.integers(len(pictures))]
            first, end = _bands(len(picture), is_test)[rng.integers(len(_bands(len(picture), is_test)))]
            top = rng.integers(first, end - resolution + 1)
            left = rng.integers(picture.shape[1] - resolution + 1)
            crops[i] = picture[top : top + resolution, left : left + resolution]
        images = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()
        labels = torch.arange(n) % len(views)
        sets.append(LabeledImages(images, labels, len(views), class_names=tuple(PHOTOS)))
    return sets[0], sets[1]


def _bands(height: int, is_test: bool) -> list[tuple[int, int]]:
    """First and end row of the bands of one part; the last band takes the rest of the rows."""
    count = height // BAND
    ends = [*(BAND * i for i in range(1, count)), height]
    return [(BAND * i, ends[i]) for i in range(count) if (i % 3 == 1) == is_test]


def _read(file: str) -> np.ndarray:
    package, _, rest = file.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(
            "the photos data set comes with scikit-learn and scikit-image, of which one is not installed: "
            "pip install 'fastgan[photos]'"
        )
    path = Path(found.origin).parent / rest
    if not path.is_file():
        raise InputError(f"the photos data set needs {path}, which the installed {package} does not have")
    return read_image(path)
