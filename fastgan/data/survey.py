"""Survey of all files of a set before training: sizes, color modes, checksums."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from fastgan.data.image_sources import ImageSource

_LEAST, _MOST = 32, 128  # resolutions that follow from the data
_GRAY_MODES = ("1", "L", "LA", "La", "I", "F")
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass
class Survey:
    """Counts over the images of a set, as they are stored.

    Attributes:
        sizes: number of images of each (width, height), turned as their EXIF orientation says.
        gray, alpha, turned, deep: number of images that are gray, have transparency, have an EXIF orientation, or more
            than 8 bits per channel in gray.
        most: largest value of the images with more than 8 bits.
        files: CRC-32 of each file by its path below the set's root.
    """

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    gray: int = 0
    alpha: int = 0
    turned: int = 0
    deep: int = 0
    most: float = 0
    files: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.sizes.total()

    @property
    def resolution(self) -> int:
        """Largest power of two that is no more than the median of the shorter sides, from 32 to 128."""
        sides = sorted(min(size) for size in self.sizes.elements())
        return min(max(1 << (sides[len(sides) // 2].bit_length() - 1), _LEAST), _MOST)

    @property
    def not_square(self) -> int:
        return sum(count for (width, height), count in self.sizes.items() if width != height)

    def describe(self) -> str:
        """Describe the set, as in "48 images 64x64 RGB (2 gray, 1 with alpha)"."""
        smallest, largest = min(self.sizes, key=_area), max(self.sizes, key=_area)
        size = "{}x{}".format(*smallest)
        if smallest != largest:
            size = f"{size} to {{}}x{{}}".format(*largest)
        all_gray = self.gray == len(self)
        extras = [f"{self.gray} gray"] if self.gray and not all_gray else []
        extras += [f"{self.alpha} with alpha"] if self.alpha else []
        return f"{len(self)} images {size} {'gray' if all_gray else 'RGB'}" + (
            f" ({', '.join(extras)})" if extras else ""
        )


def survey(source: ImageSource) -> Survey:
    """Look at the headers of all images of ``source``. Those that cannot be read are left to the reader."""
    found = Survey()
    with ThreadPoolExecutor() as pool:
        rows = pool.map(lambda index: _look(source, index), range(len(source)))
        for index, (checksum, header) in enumerate(rows):
            if checksum is not None:
                found.files[source.key(index)] = checksum
            if header is None:
                continue
            found.sizes[header.size] += 1
            found.gray += header.gray
            found.alpha += header.alpha
            found.turned += header.turned
            found.deep += header.most is not None
            found.most = max(found.most, header.most or 0)
    return found


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]
    gray: bool = False
    alpha: bool = False
    turned: bool = False
    most: float | None = None


def _look(source: ImageSource, index: int) -> tuple[str | None, _Header | None]:
    from PIL import Image

    try:
        content = source.content(index)
        if content is None:
            pixels = source.read(index)
            return None, _Header((pixels.shape[1], pixels.shape[0]), bool((pixels == pixels[..., :1]).all()))
    except (OSError, ValueError):
        return None, None
    checksum = f"{zlib.crc32(content):08x}"
    try:
        with Image.open(io.BytesIO(content)) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            size = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
            deep = image.mode.startswith("I") or image.mode == "F"
            return checksum, _Header(
                size,
                image.mode in _GRAY_MODES or image.mode.startswith("I"),
                image.has_transparency_data,
                orientation in range(2, 9),
                float(np.asarray(image).max()) if deep else None,
            )
    except Exception:  # whatever a damaged file leads to: decoding it names it
        return checksum, None


def _area(size: tuple[int, int]) -> tuple[int, int, int]:
    return size[0] * size[1], *size
