"""Image files to 8-bit RGB.

Greyscale is repeated, palettes are looked up, alpha is dropped (not blended, as pytorch-fid and clean-fid do), CMYK is
converted by Pillow without its profile, 16-bit greyscale is divided by 257 and rounded, and of 16-bit colours Pillow
keeps the upper byte. Of an animation or a multi-page
file the first picture counts; an EXIF orientation is not applied. Floating-point images have no agreed range and are
refused.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastgan._checks import InputError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset(("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"))


def is_image_name(name: str) -> bool:
    """Whether ``name`` ends in one of :data:`EXTENSIONS`, in any case."""
    return name.rpartition(".")[2].lower() in EXTENSIONS and "." in name


def read_image(path: str | Path) -> np.ndarray:
    """Decode one file to uint8 RGB, (h, w, 3). Raises ``InputError`` naming the file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return decode_image(content, str(path))


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Decode the bytes of one image file to uint8 RGB, (h, w, 3). Raises ``InputError`` that begins with ``name``."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return _to_rgb(image)
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
    ) as error:  # what Pillow's decoders raise on damaged files
        raise InputError(f"{name} cannot be read as an image: {error}") from error


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
