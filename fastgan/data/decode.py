"""Decode image files to 8-bit RGB, in threads.

Grayscale is repeated and palettes are looked up. For metrics alpha is dropped and not blended, as in pytorch-fid and
clean-fid, and EXIF orientation is not applied; for training both are done: see :class:`Decoding`. Pillow converts CMYK
without its profile. 16-bit grayscale is divided by 257 and rounded, or scaled from ``value_range``; of 16-bit colors
Pillow keeps the upper byte. Only the first picture of an animation or a multi-page file is read. Floating-point images
have no agreed range and need a ``value_range``.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fastgan._checks import InputError

if TYPE_CHECKING:
    from PIL import Image

R = TypeVar("R")


@dataclass(frozen=True)
class Decoding:
    """Conversion of files to 8-bit RGB; the defaults are those of the metrics.

    Args:
        background: RGB color that transparent images are composited on; None drops their alpha, which shows colors
            that no viewer does.
        orient: turn images as their EXIF orientation says.
        value_range: values of gray images with more than 8 bits that become 0 and 255; those outside are clamped. Empty
            for (0, 65535), or none for floating-point ones.
    """

    background: tuple[int, ...] | None = None
    orient: bool = False
    value_range: tuple[float, ...] = ()


AS_METRICS = Decoding()


def read_image(path: str | Path, how: Decoding = AS_METRICS) -> np.ndarray:
    """Decode one file to uint8 RGB, (h, w, 3). Raises ``InputError`` naming the file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return decode_image(content, str(path), how)


def decode_image(content: bytes, name: str, how: Decoding = AS_METRICS) -> np.ndarray:
    """Decode the bytes of one image file to uint8 RGB, (h, w, 3). Raises ``InputError`` that begins with ``name``."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return pillow_to_rgb(image, how)
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name} is not a readable image ({len(content)} bytes)") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:  # raised by Pillow's decoders on damaged files
        raise InputError(f"{name} cannot be read as an image: {error}") from error


def pillow_to_rgb(image: Image.Image, how: Decoding) -> np.ndarray:
    """uint8 RGB (h, w, 3) of a Pillow image. Raises ``InputError`` for modes that have none."""
    if how.orient:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    if image.mode == "F" and not how.value_range:
        raise InputError("floating-point images need a value_range")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if how.value_range:
            low, high = how.value_range
            scaled = (values.astype(np.float64) - low) * (255 / (high - low))
            if not np.isfinite(scaled).all():
                raise InputError("values must be finite, some are not")
            eight_bit = scaled.round().clip(0, 255).astype(np.uint8)
        else:
            values = values.astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise InputError("grayscale images with more than 16 bits are not supported")
            eight_bit = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
        return np.repeat(eight_bit[:, :, None], 3, axis=2)
    if how.background is not None and image.has_transparency_data:
        from PIL import Image as images

        canvas = images.new("RGBA", image.size, (*how.background, 255))
        return np.array(images.alpha_composite(canvas, image.convert("RGBA")).convert("RGB"))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # looks the palette up; a direct conversion warns about the transparency
    return np.array(image.convert("RGB"))


def load_ahead(
    load: Callable[[int], R], indices: Sequence[int], workers: int | None, ahead: int
) -> Iterator[tuple[int, Callable[[], R]]]:
    """Pair each index with a call that returns ``load(index)``, computed by threads at most ``ahead`` items in advance.

    Threads and not processes: Pillow decodes and resizes without the interpreter lock, and nothing has to be copied or
    started. ``python -m bench --suite fid`` times them against a DataLoader's worker processes.

    Args:
        workers: number of threads; None takes ``ThreadPoolExecutor``'s default, 0 loads in the calling thread.
    """
    if workers == 0:
        for index in indices:
            yield index, functools.partial(load, index)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        pending: deque[tuple[int, Future[R]]] = deque()
        try:
            for index in indices:
                pending.append((index, pool.submit(load, index)))
                if len(pending) > ahead:
                    done, future = pending.popleft()
                    yield done, future.result
            while pending:
                done, future = pending.popleft()
                yield done, future.result
        finally:
            for _, future in pending:
                future.cancel()
