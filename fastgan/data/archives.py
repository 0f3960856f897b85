"""Open a path as a set of images: a folder, a zip file, a file of an array or a tensor, or what an opener knows.

:func:`register_opener` adds a kind of source: a function that looks at a path, cheaply, and returns an
:class:`ImageSource` or None. In this way the folder of a training run becomes a source: its samples are drawn when it
is opened, and its ``reference`` is the run's data, with which ``fastgan evaluate RUN`` compares them.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePath
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.decode import decode_image
from fastgan.data.find import no_images, select_images
from fastgan.data.image_sources import ImageFolder, ImageSource, classes_of_folders

IMAGE_KEYS = ("images", "arr_0", "x", "samples")
"""Where an npz may hold its images; a file with one array only may call it anything."""

LABEL_KEYS = ("labels", "y")
"""Where an npz may hold their classes."""

ARRAY_FILES = (".npz", ".npy", ".pt", ".pth")
"""NumPy's, and tensors of ``torch.save``."""

Opener = Callable[[Path, bool], ImageSource | None]
"""(path, skip_bad) -> the source, or None for a path of another kind."""

_openers: list[Opener] = []


def register_opener(opener: Opener) -> None:
    """Let :func:`open_images` ask ``opener`` first. An opener that is registered already is not added again."""
    if opener not in _openers:
        _openers.append(opener)


def open_images(path: str | Path, *, skip_bad: bool = False) -> ImageSource:
    """The images behind ``path``. Raises ``InputError`` where there are none or they cannot be read."""
    path = Path(path)
    for opener in _openers:
        source = opener(path, skip_bad)
        if source is not None:
            return source
    if path.is_file() and path.suffix.lower() in ARRAY_FILES:
        return ImageArray.load(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return ImageZip(path, skip_bad=skip_bad)
    if path.is_file():
        raise InputError(f"{path} is neither a folder of images, a zip file nor one of {', '.join(ARRAY_FILES)}")
    return ImageFolder(path, skip_bad=skip_bad)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file, without unpickling. Raises ``InputError`` naming the file."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(2)
            if beginning != b"PK":
                raise InputError(f"{path} is not an npz file")
        with np.load(path, allow_pickle=False) as loaded:
            return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except InputError:
        raise
    except ValueError as error:
        reason = "it holds pickled objects, which are never loaded" if "pickle" in str(error) else str(error)
        raise InputError(f"{path} cannot be read: {reason}") from error
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read, it may be damaged: {error}") from error


class ImageZip(ImageSource):
    """All images in a zip file, in the order of their names.

    Raises:
        InputError: the file is damaged, or holds no images.
    """

    def __init__(self, path: str | Path, *, skip_bad: bool = False) -> None:
        super().__init__(str(path), skip_bad=skip_bad)
        try:
            self._file = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as a zip file: {error}") from error
        self._lock = Lock()
        names = {PurePath(entry.filename): entry.filename for entry in self._file.infolist() if not entry.is_dir()}
        found = select_images(names)
        if not found.paths:
            raise InputError(no_images(path, found))
        self.names = [names[name] for name in found.paths]
        self.left_out = found.left_out_line()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        return decode_image(self.content(index), self.name(index), self.decoding)

    def content(self, index: int) -> bytes:
        try:
            with self._lock:  # one file handle for all threads
                return self._file.read(self.names[index])
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # RuntimeError: a password is needed
            raise InputError(f"{self.name(index)} cannot be read: {error}") from error

    def key(self, index: int) -> str:
        return self.names[index]

    def name(self, index: int) -> str:
        return f"{self.label}/{self.names[index]}"

    def classes(self) -> tuple[tuple[str, ...], list[int]]:
        paths = [PurePath(name) for name in self.names]
        while all(path.parts[0] == paths[0].parts[0] and len(path.parts) > 1 for path in paths):
            paths = [path.relative_to(path.parts[0]) for path in paths]  # the folder that was zipped
        return classes_of_folders(paths)

    def _identity(self, index: int) -> str:
        entry = self._file.getinfo(self.names[index])
        return f"{entry.filename}:{entry.file_size}:{entry.CRC}"


class ImageArray(ImageSource):
    """Images of one size in one array.

    Args:
        images: uint8 in [0, 255] or floating-point in [0, 1]; (n, h, w, c), (n, c, h, w) or (n, h, w), with c 1 or 3. A
            tensor of any device, or an array.
        labels: the class of each image, integers (n,) from 0, for :meth:`classes`; None for none.

    Raises:
        InputError: another shape or dtype, no images, or floating-point values outside [0, 1].
    """

    def __init__(
        self, images: np.ndarray | Tensor, *, label: str = "images", labels: np.ndarray | Tensor | None = None
    ) -> None:
        super().__init__(label)
        array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
        if array.dtype != np.uint8 and array.size:
            if not np.issubdtype(array.dtype, np.floating):
                raise InputError(
                    f"{label} must hold uint8 in [0, 255] or floating-point in [0, 1], got dtype {array.dtype}"
                )
            low, high = array.min(), array.max()
            if not (low >= 0 and high <= 1):  # also where there is a NaN
                raise InputError(
                    f"{label} of dtype {array.dtype} must lie in [0, 1] (uint8: [0, 255]), got [{low:g}, {high:g}]"
                )
        if array.ndim == 3:
            array = array[..., None]
        if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
            array = array.transpose(0, 2, 3, 1)
        if array.ndim != 4 or array.shape[3] not in (1, 3) or array.size == 0:
            expected = "images (n, h, w, c) or (n, c, h, w), c = 1 or 3"
            raise InputError(f"{label} must hold {expected}, got shape {array.shape}")
        self.images = np.broadcast_to(array, (*array.shape[:3], 3))
        self._labels = labels

    @classmethod
    def load(cls, path: str | Path) -> ImageArray:
        """Read a file of :data:`ARRAY_FILES`: an array, a tensor, or an npz.

        An npz holds its images as its only array or under one of :data:`IMAGE_KEYS`, and perhaps their classes under
        one of :data:`LABEL_KEYS`. Only tensors are unpickled, and
        an npy file is read from disk image by image.
        """
        path = Path(path)
        if path.suffix.lower() == ".npz":
            arrays = read_npz(path)
            keys = [key for key in IMAGE_KEYS if key in arrays] or [key for key in arrays if key not in LABEL_KEYS]
            labels = next((arrays[key] for key in LABEL_KEYS if key in arrays), None)
            if not keys or (len(keys) > 1 and keys[0] not in IMAGE_KEYS):
                allowed = f"statistics (mu and sigma) or images as one of {', '.join(IMAGE_KEYS)}"
                raise InputError(f"{path} must hold {allowed}, it has: {', '.join(arrays) or 'nothing'}")
            return cls(arrays[keys[0]], label=str(path), labels=labels)
        try:
            if path.suffix.lower() == ".npy":
                images = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                images = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the damage leads to
            raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        if not isinstance(images, np.ndarray | Tensor):
            raise InputError(f"{path} must hold one tensor of images, it holds a {type(images).__name__}")
        return cls(images, label=str(path))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        image = self.images[index]
        return image if image.dtype == np.uint8 else image.astype(np.float32) * 255

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"

    def classes(self) -> tuple[tuple[str, ...], list[int]]:
        if self._labels is None:
            return super().classes()
        labels: list[int] = _checked_labels(self._labels, len(self), self.label).tolist()
        return tuple(map(str, range(max(labels) + 1))), labels

    def _identity(self, index: int) -> str:
        return str(zlib.crc32(np.ascontiguousarray(self.images[index]).data))


def _checked_labels(labels: np.ndarray | Tensor, n: int, of: str) -> np.ndarray:
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    array = array[:, 0] if array.shape == (n, 1) else array
    if array.shape != (n,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise InputError(f"labels of {of} must be {n} integers from 0, got {array.dtype} of shape {array.shape}")
    return array
