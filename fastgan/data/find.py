"""Decide which files belong to a set of images: the one rule of metrics and training, for folders and archives.

A name counts if Pillow reads its format (:func:`image_extensions`) and no part of its path below the root is hidden
(a leading dot: ``.ipynb_checkpoints``, macOS's ``._name``), ``__MACOSX``, or a thumbnail file of Windows. Links to
folders are followed, but not back into a folder that the link itself lies in.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from fastgan._checks import InputError

EXTENSIONS = frozenset(
    (
        "avif",
        "bmp",
        "gif",
        "ico",
        "jfif",
        "jp2",
        "jpe",
        "jpeg",
        "jpg",
        "pbm",
        "pgm",
        "png",
        "pnm",
        "ppm",
        "tga",
        "tif",
        "tiff",
        "webp",
    )
)
"""File extensions of images, where this machine's Pillow can decode them."""

LABEL_FILES = ("dataset.json", "labels.csv")
"""Files at the top of a set that hold the classes of its images; they are not reported as left out."""

_NEVER = frozenset(("__macosx", "thumbs.db", "desktop.ini"))
_LISTED = 4  # extensions in the line about what was left out


@functools.cache
def image_extensions() -> frozenset[str]:
    """The :data:`EXTENSIONS` that the installed Pillow can decode; AVIF and JPEG 2000 depend on how it was built."""
    from PIL import Image

    Image.init()
    formats = Image.registered_extensions()
    return frozenset(extension for extension in EXTENSIONS if formats.get(f".{extension}") in Image.OPEN)


@dataclass
class Found:
    """Sorted paths of a set's images below its root, and counts of the entries left out, by reason.

    >>> found = select_images(["b.png", "a.JPG", "._a.JPG", "notes.txt"])
    >>> [str(path) for path in found.paths], found.left_out_line()
    (['a.JPG', 'b.png'], '1 hidden, 1 no image (.txt)')
    """

    paths: list[PurePath] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    _extensions: Counter[str] = field(default_factory=Counter)

    def add(self, path: PurePath) -> None:
        """Add ``path``, relative to the root, to the images, or count the reason not to."""
        if str(path) in LABEL_FILES:
            return
        reason = why_left_out(path.parts)
        extension = path.suffix[1:].lower()
        if reason is None and extension in image_extensions():
            self.paths.append(path)
        elif reason is None and extension in EXTENSIONS:
            self.left_out["in a format that this Pillow cannot read"] += 1
        elif reason is None:
            self.left_out["no image"] += 1
            self._extensions[path.suffix or "no extension"] += 1
        else:
            self.left_out[reason] += 1

    def left_out_line(self) -> str:
        """Counts by reason, such as ``2 hidden, 3 no image (.txt, .json)``; empty if nothing was left out."""
        kinds = [extension for extension, _ in self._extensions.most_common()]
        names = ", ".join(kinds[:_LISTED]) + (", ..." if len(kinds) > _LISTED else "")
        return ", ".join(
            f"{count} {reason}" + (f" ({names})" if reason == "no image" else "")
            for reason, count in sorted(self.left_out.items())
        )


def is_image(path: PurePath) -> bool:
    """Return whether the file ``path`` counts, by its own name."""
    return why_left_out((path.name,)) is None and path.suffix[1:].lower() in image_extensions()


def select_images(names: Iterable[str | PurePath]) -> Found:
    """The images among ``names``, paths below the root of an archive."""
    found = Found()
    for name in names:
        found.add(PurePath(name))
    found.paths.sort()
    return found


def search_folder(root: str | Path) -> Found:
    """The images under ``root``, a folder. Hidden folders count as one left-out entry each and are not entered.

    Raises:
        InputError: ``root`` is no folder, a folder in it cannot be read, or there are no images.
    """
    root = Path(root)
    if not root.exists():
        raise InputError(f"{root}: no such folder")
    if not root.is_dir():
        raise InputError(f"{root} is not a folder of images")
    found = Found()
    _search(root, PurePath(), (), found)
    if not found.paths:
        raise InputError(no_images(root, found))
    found.paths.sort()
    return found


def find_images(root: str | Path) -> list[Path]:
    """Paths of all images under ``root``, sorted. Raises ``InputError`` as :func:`search_folder`."""
    return [Path(root, path) for path in search_folder(root).paths]


def no_images(source: str | Path, found: Found) -> str:
    """Message about a source without images."""
    left_out = found.left_out_line()
    return f"{source} holds no images ({', '.join(sorted(image_extensions()))})" + (
        f"; left out: {left_out}" if left_out else ""
    )


def _search(root: Path, below: PurePath, ancestors: tuple[tuple[int, int], ...], found: Found) -> None:
    folder = root / below
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read folder {error.filename}: {error.strerror}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        found.left_out["links back to a folder around them"] += 1
        return
    for entry in entries:
        path = below / entry.name
        if not entry.is_dir():
            found.add(path)
        elif (reason := why_left_out((entry.name,))) is not None:
            found.left_out[reason] += 1
        else:
            _search(root, path, (*ancestors, identity), found)


def why_left_out(parts: Iterable[str]) -> str | None:
    """Reason for which a path of these parts never counts; None if it may."""
    for part in parts:
        if part.lower() in _NEVER:
            return "system files"
        if part.startswith(".") and part not in (".", ".."):
            return "hidden"
    return None
