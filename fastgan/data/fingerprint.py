"""Fingerprints of a data set's files, to tell whether it is still the one that a run was trained on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CHUNK = 1 << 20
_NAMED = 3  # files listed in a message


def fingerprint_files(root: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Map the path of each file below ``root`` to its CRC-32, 8 hexadecimal digits. Folders may move as a whole."""

    def crc(path: Path) -> str:
        value = 0
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                value = zlib.crc32(chunk, value)
        return f"{value:08x}"

    with ThreadPoolExecutor() as pool:
        return dict(zip((path.relative_to(root).as_posix() for path in paths), pool.map(crc, paths), strict=True))


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Describe how the files differ: "2 files are gone: a/1.png, a/2.png; 1 file is new: ..."; "" if they do not."""
    kinds = (
        ("gone", sorted(before.keys() - now.keys())),
        ("new", sorted(now.keys() - before.keys())),
        ("changed", sorted(name for name in before.keys() & now.keys() if before[name] != now[name])),
    )
    return "; ".join(
        f"{len(names)} {'file is' if len(names) == 1 else 'files are'} {kind}: "
        f"{', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''}"
        for kind, names in kinds
        if names
    )
