"""Open a path as a set of images: a folder, an archive, a file with an array, or whatever an opener recognizes.

:func:`register_opener` adds a kind of source: a function that looks at a path, cheaply, and returns an
:class:`ImageSource` or None. In this way the folder of a training run becomes a source: its samples are drawn when it
is opened, and its ``reference`` is the run's data, with which ``fastgan evaluate RUN`` compares them.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.decode import decode_image, pillow_to_rgb
from fastgan.data.find import is_image, no_images, select_images
from fastgan.data.image_sources import ImageFolder, ImageSource, classes_of_folders, numbered_classes
from fastgan.data.tar_files import ImageTar

IMAGE_KEYS = ("images", "arr_0", "x", "samples")
"""Names of the images in an npz file; a file with a single array may use any name."""

LABEL_KEYS = ("labels", "y")
"""Names of the labels in an npz file."""

_ITEM_IMAGES, _ITEM_LABELS = ("image", "img", "images"), ("label", "labels", "fine_label")

ARRAY_FILES = (".npz", ".npy", ".pt", ".pth", ".h5", ".hdf5")
"""Extensions of array files: NumPy, ``torch.save``, and HDF5, which needs h5py."""

Opener = Callable[[Path, bool], ImageSource | None]
"""(path, skip_bad) -> the source, or None for a path of another kind."""

_openers: list[Opener] = []


def register_opener(opener: Opener) -> None:
    """Add ``opener`` to those that :func:`open_images` asks first; a second registration has no effect."""
    if opener not in _openers:
        _openers.append(opener)


def open_images(path: str | Path | Any, *, skip_bad: bool = False, key: str | None = None) -> ImageSource:
    """Open the images behind ``path``.

    A path may be a folder of images or of tar shards, a zip or tar file, or a file of :data:`ARRAY_FILES`. In Python it
    may also be a dataset with a length, as :class:`ImageDataset` describes.

    Args:
        skip_bad: leave out images that cannot be read.
        key: the name of the array in an npz, HDF5 or dictionary file; None takes the only one or one of
            :data:`IMAGE_KEYS`.

    Raises:
        InputError: there are no images, or they cannot be read.

    Example:
        >>> import numpy as np
        >>> np.save("images.npy", np.zeros((5, 8, 8, 3), dtype=np.uint8))
        >>> len(open_images("images.npy"))
        5
    """
    if not isinstance(path, str | Path):
        return path if isinstance(path, ImageSource) else ImageDataset(path, skip_bad=skip_bad)
    path = Path(path)
    for opener in _openers:
        source = opener(path, skip_bad)
        if source is not None:
            return source
    if path.is_file() and path.suffix.lower() in ARRAY_FILES:
        return ImageArray.load(path, key=key)
    if key is not None:
        raise InputError(f"key must be None for {path}, which is none of {', '.join(ARRAY_FILES)}")
    if path.is_file() and zipfile.is_zipfile(path):
        return ImageZip(path, skip_bad=skip_bad)
    if path.is_file() and tarfile.is_tarfile(path):
        return ImageTar([path], skip_bad=skip_bad)
    if path.is_file():
        raise InputError(f"{path} is neither a folder of images, a zip file nor one of {', '.join(ARRAY_FILES)}, .tar")
    shards = sorted(path.glob("*.tar")) if path.is_dir() else []
    if shards and not any(is_image(entry) for entry in path.iterdir()):
        return ImageTar(shards, label=str(path), skip_bad=skip_bad)
    return ImageFolder(path, skip_bad=skip_bad)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an npz file without unpickling. Raises ``InputError`` naming the file."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(2)
            if beginning != b"PK":
                raise InputError(f"{path} is not an npz file")
        with np.load(path, allow_pickle=False) as loaded:
            return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder, not an npz file") from error
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
            if np.isnan(low):
                raise InputError(f"{label} must hold finite values, some are not a number")
            if not (low >= 0 and high <= 1):
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
    def load(cls, path: str | Path, *, key: str | None = None) -> ImageArray:
        """Read a file of :data:`ARRAY_FILES`: an array, a tensor, or several by name.

        An npz, an HDF5 file or a dictionary of tensors holds its images under ``key``, as its only array or under one
        of :data:`IMAGE_KEYS`, and perhaps their classes under one of :data:`LABEL_KEYS`. A list holds images of one
        size. Only tensors are unpickled, and an npy file is read from disk image by image.
        """
        path = Path(path)
        content = _read_file(path)
        if isinstance(content, list | tuple) and content:
            try:
                content = torch.stack([torch.as_tensor(image) for image in content])
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{path} must hold images of one size in its list: {error}") from error
        if isinstance(content, np.ndarray | Tensor):
            if key is not None:
                raise InputError(f"key must be None for {path}, which holds one array")
            return cls(content, label=str(path))
        if not isinstance(content, Mapping):
            raise InputError(f"{path} must hold one tensor of images, it holds a {type(content).__name__}")
        names = [str(name) for name in content]
        keys = [name for name in IMAGE_KEYS if name in content] or [name for name in names if name not in LABEL_KEYS]
        found = key if key is not None else keys[0] if keys and (keys[0] in IMAGE_KEYS or len(keys) == 1) else None
        if found not in content:
            allowed = f"images under {key}" if key else "statistics (mu and sigma) or images as one of "
            allowed += "" if key else ", ".join(IMAGE_KEYS)
            raise InputError(f"{path} must hold {allowed}, it has: {', '.join(names) or 'nothing'}")
        labels = next((content[name] for name in LABEL_KEYS if name in content), None)
        return cls(content[found], label=str(path), labels=labels)

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
        return numbered_classes(labels, self.label), labels

    def _identity(self, index: int) -> str:
        return str(zlib.crc32(np.ascontiguousarray(self.images[index]).data))


class ImageDataset(ImageSource):
    """Images of a torchvision or Hugging Face dataset, or of any other with a length.

    Items are images, ``(image, label)``, or mappings with "image" or "img" and perhaps "label" or "fine_label".

    An image is a Pillow image, an array (h, w, c), or a tensor (c, h, w); uint8, or floating-point in [0, 1].

    Raises:
        InputError: ``dataset`` has no length and items, or none at all; while images are read, the first that is none.
    """

    def __init__(self, dataset: Any, *, label: str | None = None, skip_bad: bool = False) -> None:
        super().__init__(label or type(dataset).__name__, skip_bad=skip_bad)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise InputError(f"images must be a path or a dataset with a length, got {type(dataset).__name__}")
        if not len(dataset):
            raise InputError(f"{self.label} holds no images")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> np.ndarray:
        item = self._item(index)[0]
        if hasattr(item, "getbands"):  # Pillow's
            return pillow_to_rgb(item, self.decoding)
        if not isinstance(item, np.ndarray | Tensor) or item.ndim != 3:
            raise InputError(f"{self.name(index)} must be a Pillow image, an array (h, w, c) or a tensor (c, h, w)")
        return ImageArray(item[None], label=self.name(index)).read(0)

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"

    def classes(self) -> tuple[tuple[str, ...], list[int]]:
        columns = getattr(self.dataset, "column_names", ())  # Hugging Face's, which need not decode the images for it
        column = next((name for name in _ITEM_LABELS if name in columns), None)
        if column is not None:
            labels, names = [*self.dataset[column]], getattr(self.dataset.features[column], "names", None)
        else:
            labels = [self._item(index)[1] for index in range(len(self))]
            names = getattr(self.dataset, "classes", None)
        if any(label is None for label in labels):
            return super().classes()
        found = _checked_labels(np.asarray(labels), len(self), self.label).tolist()
        return tuple(map(str, names)) if names else numbered_classes(found, self.label), found

    def _item(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if isinstance(item, Mapping):
            image = next((item[name] for name in _ITEM_IMAGES if name in item), None)
            return image, next((item[name] for name in _ITEM_LABELS if name in item), None)
        if isinstance(item, tuple | list):
            return item[0], item[1] if len(item) > 1 else None
        return item, None


def _read_file(path: Path) -> Any:
    """Read a file of :data:`ARRAY_FILES`. Raises ``InputError`` naming it."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return read_npz(path)
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if suffix in (".h5", ".hdf5"):
            import h5py

            with h5py.File(path) as file:
                return {name: file[name][()] for name in file if isinstance(file[name], h5py.Dataset)}
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise InputError(f"{path} needs h5py: run `pip install h5py`") from error
    except Exception as error:  # whatever the damage leads to
        if suffix == ".npy" and "pickle" in str(error):  # what NumPy takes any other content for
            raise InputError(f"{path} is no npy file of numbers") from error
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _checked_labels(labels: np.ndarray | Tensor, n: int, of: str) -> np.ndarray:
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    array = array[:, 0] if array.shape == (n, 1) else array
    if array.shape != (n,) or array.dtype.kind not in "iu":
        raise InputError(f"labels of {of} must be {n} integers from 0, got {array.dtype} of shape {array.shape}")
    if array.min() < 0:
        raise InputError(f"labels of {of} must be integers from 0, got {array.min()}")
    return array
