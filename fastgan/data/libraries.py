"""Data sets that torchvision and Hugging Face's datasets can load, by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fastgan._checks import InputError
from fastgan._files import CACHE
from fastgan.data.archives import ImageDataset

PREFIXES = ("torchvision", "huggingface")

_HELD_OUT = ("test", "validation", "valid", "val")


def open_library(source: str, *, skip_bad: bool = False) -> tuple[ImageDataset, ImageDataset | None]:
    """Open ``torchvision:NAME`` or ``huggingface:NAME`` and return its training and its test images.

    NAME is a class of ``torchvision.datasets``, such as FashionMNIST, which is downloaded into :data:`CACHE`; or what
    ``datasets.load_dataset`` takes, or a folder that ``save_to_disk`` wrote. Without a test split the second is None.

    Raises:
        InputError: there is no such data set, it is not one of labeled images, or it cannot be downloaded.
    """
    library, _, name = source.partition(":")
    parts = _torchvision(name) if library == "torchvision" else _hugging_face(name)
    sources = [
        None if part is None else ImageDataset(part, label=f"{source} ({of})", skip_bad=skip_bad)
        for part, of in zip(parts, ("train", "test"), strict=True)
    ]
    assert sources[0] is not None
    return sources[0], sources[1]


def _torchvision(name: str) -> tuple[Any, Any]:
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    parameters = inspect.signature(kind).parameters if inspect.isclass(kind) else {}
    choice = next((key for key in ("train", "split") if key in parameters), None)
    if kind is None or choice is None or "download" not in parameters:
        raise InputError(
            f"torchvision:{name} must name a class of torchvision.datasets with a download and a train or split "
            "argument, such as MNIST, FashionMNIST, CIFAR100 or SVHN"
        )
    values: tuple[Any, Any] = (True, False) if choice == "train" else ("train", "test")
    root = CACHE.expanduser() / name.lower()
    try:
        train, test = (kind(root, download=True, **{choice: value}) for value in values)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{name} is not under {root} and cannot be downloaded ({error}): put its files there"
        ) from error
    return train, test


def _hugging_face(name: str) -> tuple[Any, Any]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"huggingface:{name} needs the package datasets: pip install datasets") from error
    try:
        folder = Path(name).expanduser()
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(name)
    except Exception as error:  # of the network, the hub and the files
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"huggingface:{name} cannot be loaded: {lines[0]}") from error
    if not isinstance(found, dict):
        return found, None
    train = found.get("train", next(iter(found.values())))
    return train, next((found[part] for part in _HELD_OUT if part in found and found[part] is not train), None)
