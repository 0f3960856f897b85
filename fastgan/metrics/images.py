"""Folders of images: found recursively, decoded to 8-bit RGB, and batched at one size.

Every file becomes RGB with 8 bits a channel: greyscale is repeated, palettes are looked up, alpha is dropped (not
blended, as pytorch-fid and clean-fid do), CMYK is converted by Pillow without its profile, 16-bit greyscale is
divided by 257 and rounded. Of an animation or a multi-page file the first picture counts; an EXIF orientation is not
applied. Floating-point images have no agreed range and are refused.
"""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastgan.metrics.errors import InputError
from fastgan.metrics.resize import check_resize, resize_array

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset(("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"))
_PREFETCH_BATCHES = 2


class ImageFolder:
    """All images under a folder, in the order of their paths.

    Args:
        root: searched recursively for the extensions of :data:`EXTENSIONS` in any case; links to folders are not
            followed.
        skip_bad: leave out images that cannot be read and list them in ``skipped``, rather than stop at the first.

    Raises:
        InputError: ``root`` is no folder, or holds no images.
    """

    def __init__(self, root: str | Path, *, skip_bad: bool = False) -> None:
        self.root = Path(root)
        self.paths = find_images(self.root)
        self.skip_bad = skip_bad
        self.skipped: list[Path] = []

    def __len__(self) -> int:
        return len(self.paths)

    def batches(
        self,
        size: int,
        *,
        batch_size: int = 64,
        resize: str = "clean",
        num_workers: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Yield float32 batches (<= batch_size, 3, size, size) in [0, 255], decoded and resized by ``num_workers``
        threads.

        Args:
            size: height and width of the batches; each image is resized to it on its own, whatever its size and shape.
            num_workers: None takes one thread per core, 8 at most; 0 decodes in the calling thread.
            progress: called with the number of files done since the last call.

        Raises:
            InputError: a file cannot be read (it is named), unless ``skip_bad``.
        """
        check_resize(resize)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        batch: list[Tensor] = []
        self.skipped = []
        for image in self._load(size, resize, num_workers, batch_size * _PREFETCH_BATCHES):
            if progress is not None:
                progress(1)
            if image is not None:
                batch.append(image)
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)

    def _load(self, size: int, resize: str, num_workers: int | None, ahead: int) -> Iterator[Tensor | None]:
        def load(path: Path) -> Tensor:
            return resize_array(read_image(path), size, resize)

        for path, result in _map_ahead(load, self.paths, _worker_count(num_workers), ahead):
            try:
                yield result()
            except InputError:
                if not self.skip_bad:
                    raise
                self.skipped.append(path)
                yield None


def find_images(root: str | Path) -> list[Path]:
    """Paths of all images under ``root``, sorted. Raises ``InputError`` for no folder and for none in it."""
    root = Path(root)
    if not root.exists():
        raise InputError(f"{root}: no such folder")
    if not root.is_dir():
        raise InputError(f"{root} is neither a folder of images nor an .npz file of statistics")
    found = []
    for folder, _, names in os.walk(root, onerror=_raise_unreadable):
        found += [Path(folder, name) for name in names if os.path.splitext(name)[1][1:].lower() in EXTENSIONS]
    if not found:
        raise InputError(f"{root} holds no images ({', '.join(sorted(EXTENSIONS))})")
    return sorted(found)


def read_image(path: str | Path) -> np.ndarray:
    """Decode one file to uint8 RGB, (h, w, 3), as described above. Raises ``InputError`` naming the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path} is not a readable image ({_size_on_disk(Path(path))})") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:  # what Pillow's decoders raise on damaged files
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise InputError("floating-point images are not supported")
    if image.mode.startswith("I"):
        return _sixteen_bit_to_rgb(np.asarray(image))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # looks the palette up; a direct conversion warns about the transparency
    return np.array(image.convert("RGB"))


def _sixteen_bit_to_rgb(grey: np.ndarray) -> np.ndarray:
    values = grey.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise InputError("greyscale images with more than 16 bits are not supported")
    eight_bit = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
    return np.repeat(eight_bit[:, :, None], 3, axis=2)


def _size_on_disk(path: Path) -> str:
    return f"{path.stat().st_size} bytes"


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"cannot read folder {error.filename}: {error.strerror}") from error


def _worker_count(num_workers: int | None) -> int:
    if num_workers is None:
        return min(os.cpu_count() or 1, 8)
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    return num_workers


def _map_ahead(
    load: Callable[[Path], Tensor], paths: list[Path], workers: int, ahead: int
) -> Iterator[tuple[Path, Callable[[], Tensor]]]:
    """Pair each path with a call that gives its result, computed by threads at most ``ahead`` files in advance.

    Threads and not processes: Pillow decodes and resizes without the interpreter lock, and nothing has to be copied.
    """
    if workers == 0:
        for path in paths:
            yield path, functools.partial(load, path)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        pending: deque[tuple[Path, Future[Tensor]]] = deque()
        try:
            for path in paths:
                pending.append((path, pool.submit(load, path)))
                if len(pending) > ahead:
                    done, future = pending.popleft()
                    yield done, future.result
            while pending:
                done, future = pending.popleft()
                yield done, future.result
        finally:
            for _, future in pending:
                future.cancel()
