"""Sets of images that can be read one by one: the interface, and folders of files.

Because images are read by index, several processes can share a set, and an interrupted pass can resume.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.decode import AS_METRICS, load_ahead, read_image
from fastgan.data.find import find_images as find_images
from fastgan.data.find import search_folder, why_left_out
from fastgan.data.resize import channels_first, check_resize, clean_with_pillow, resize_tensor
from fastgan.data.stage_times import StageTimes

_PREFETCH_BATCHES = 2
_MOST_EMPTY_CLASSES = 1000  # a few images of ImageNet are fine, numbers of articles are no classes


class ImageSource(ABC):
    """A set of images that are read one by one; subclasses read folders, archives, arrays and more.

    Args:
        label: how messages and results name the set.
        skip_bad: leave out images that cannot be read and list their names in ``skipped``, rather than stop at the
            first.

    Attributes:
        reference: the set that ``fastgan evaluate`` compares this one with by default: another source, or
            the path of one. None for most; the samples of a training run have the run's held-out images.
        decoding: how files become RGB, by default as the metrics have it.
        left_out: counts of the entries that are not of the set, in words; empty if there are none.
        backbone: the network that scores this set by default; a training run has one.
        second_split: other images of the same data, whose distance to the reference is reported as the floor; those
            that a run was trained on.

    Example:
        >>> class Noise(ImageSource):
        ...     def __len__(self):
        ...         return 10
        ...
        ...     def read(self, i):
        ...         return torch.rand(3, 32, 32)
        ...
        ...     def name(self, i):
        ...         return f"noise {i}"
        >>> len(Noise("noise"))
        10
    """

    def __init__(self, label: str, *, skip_bad: bool = False) -> None:
        self.label = label
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.left_out = ""
        self.decoding = AS_METRICS
        self.reference: Path | ImageSource | None = None
        self.backbone: str | None = None
        self.second_split: ImageSource | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, the unreadable ones too."""

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Image ``index`` as RGB (h, w, 3), uint8 or float32 in [0, 255]. Called by several threads.

        Raises:
            InputError: the image cannot be read; the message names it.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of image ``index`` in messages."""

    def content(self, index: int) -> bytes | None:
        """Bytes of the file of image ``index``; None if it has no file. Raises as :meth:`read`."""
        return None

    def key(self, index: int) -> str:
        """Path of image ``index`` below the root of the set."""
        return str(index)

    def classes(self) -> tuple[tuple[str, ...], list[int]]:
        """Names of the classes, and the class of each image; no names and zeros if there are no classes.

        In folders and archives the top folders are classes, sorted by name, if no image lies beside them.

        Raises:
            InputError: a class has no images; it is named.
        """
        return (), [0] * len(self)

    def left_out_line(self) -> str:
        """Describe and count what was left out: entries outside the set, and images that could not be read so far."""
        parts = [self.left_out] if self.left_out else []
        return ", ".join([*parts, f"{len(self.skipped)} unreadable"] if self.skipped else parts)

    def fingerprint(self) -> str:
        """Digest that changes with the images, as far as can be seen without reading them."""
        digest = hashlib.sha256(os.fsencode(f"{self.label}:{len(self)}"))  # names need be no UTF-8
        for index in range(len(self)):
            digest.update(os.fsencode(self._identity(index)))
        return digest.hexdigest()

    def _identity(self, index: int) -> str:
        return self.name(index)

    def batches(
        self,
        size: int | None,
        *,
        batch_size: int = 64,
        resize: str = "clean",
        num_workers: int | None = None,
        indices: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] | None = None,
        times: StageTimes | None = None,
    ) -> Iterator[Tensor]:
        """Yield float32 batches (<= batch_size, 3, size, size) in [0, 255], decoded by ``num_workers`` threads.

        ``clean`` resizing is Pillow's and done by these threads too; the others are done on ``device``.

        Args:
            size: height and width of the batches, to which each image is resized on its own; None leaves the images as
                they are, which must then be of one size.
            num_workers: None takes one thread per core, 8 at most; 0 decodes in the calling thread.
            indices: which images, in which order; None takes all.
            device: of the batches.
            progress: called with the number of images done since the last call.
            times: to which the seconds of decoding, waiting and resizing are added.

        Raises:
            InputError: an image cannot be read (it is named), unless ``skip_bad``.
        """
        check_resize(resize)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers is None:
            num_workers = min(os.cpu_count() or 1, 8)
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")

        times = times or StageTimes()
        times.threads = num_workers

        def load(index: int) -> Tensor:
            with times.measure("decode"):
                image = self.read(index)
                if size is None or resize != "clean":
                    return torch.from_numpy(np.require(channels_first(image), requirements="W"))  # torch warns
                return torch.from_numpy(clean_with_pillow(image, size))

        def resized(batch: list[Tensor]) -> Tensor:
            with times.measure("resize"):
                return _to_batch(batch, size, resize, device)

        indices = range(len(self)) if indices is None else indices
        batch: list[Tensor] = []
        for index, result in load_ahead(load, indices, num_workers, batch_size * _PREFETCH_BATCHES):
            try:
                with times.measure("waiting"):
                    image = result()
                batch.append(image)
            except InputError:
                if not self.skip_bad:
                    raise
                self.skipped.append(self.name(index))
            if progress is not None:
                progress(1)
            if len(batch) == batch_size:
                yield resized(batch)
                batch = []
        if batch:
            yield resized(batch)


class ImageFolder(ImageSource):
    """All images under a folder, in the order of their paths.

    Args:
        root: searched recursively; :mod:`fastgan.data.find` says which files count.

    Raises:
        InputError: ``root`` is no folder, or holds no images.

    Example:
        >>> from torchvision.utils import save_image
        >>> save_image(torch.rand(3, 8, 8), "a.png")
        >>> len(ImageFolder("."))
        1
    """

    def __init__(self, root: str | Path, *, skip_bad: bool = False) -> None:
        super().__init__(str(root), skip_bad=skip_bad)
        self.root = Path(root)
        found = search_folder(self.root)
        self.relative_paths = found.paths
        self.paths = [self.root / path for path in found.paths]
        self.left_out = found.left_out_line()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        return read_image(self.paths[index], self.decoding)

    def content(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def key(self, index: int) -> str:
        return self.relative_paths[index].as_posix()

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def classes(self) -> tuple[tuple[str, ...], list[int]]:
        names, labels = classes_of_folders(self.relative_paths)
        for folder in sorted(self.root.iterdir()) if names else ():
            if folder.is_dir() and folder.name not in names and why_left_out((folder.name,)) is None:
                raise InputError(f"{folder} holds no images: every subfolder is a class and must have some")
        return names, labels

    def _identity(self, index: int) -> str:
        found = self.paths[index].stat()
        return f"{self.paths[index]}:{found.st_size}:{found.st_mtime_ns}"


def classes_of_folders(paths: Sequence[PurePath]) -> tuple[tuple[str, ...], list[int]]:
    """Class names and labels of relative ``paths``, by their first folders.

    There are no names, and all labels are zero, if an image lies in no folder.
    """
    if any(len(path.parts) == 1 for path in paths):
        return (), [0] * len(paths)
    names = tuple(sorted({path.parts[0] for path in paths}))
    number = {name: i for i, name in enumerate(names)}
    return names, [number[path.parts[0]] for path in paths]


def numbered_classes(labels: Sequence[int], of: str) -> tuple[str, ...]:
    """Names "0", "1", ... of the classes that ``labels`` count.

    Raises:
        InputError: there are more classes than images, and more than 1000; ``of`` is named.
    """
    n = max(labels) + 1
    if n > max(len(labels), _MOST_EMPTY_CLASSES):
        raise InputError(
            f"labels of {of} reach {n - 1} for {len(labels)} images: number the classes 0, 1, 2, ... without gaps"
        )
    return tuple(map(str, range(n)))


def _to_batch(batch: list[Tensor], size: int | None, resize: str, device: torch.device | str) -> Tensor:
    """Stack a batch to float32 (n, 3, size, size), resizing it if the threads have not."""
    shapes = {tuple(image.shape[1:]) for image in batch}
    if len(shapes) == 1:
        pixels = torch.stack(batch).to(device).float()
        return pixels if size is None else resize_tensor(pixels, size, resize)
    if size is None:
        sizes = ", ".join(f"{height}x{width}" for height, width in sorted(shapes)[:3])
        raise InputError(f"images of different sizes ({sizes}) need a backbone with an input_size to be resized to")
    return torch.cat([resize_tensor(image[None].to(device).float(), size, resize) for image in batch])
