"""Atomic files: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastgan._checks import InputError

CACHE = Path("~", ".cache", "fastgan")
"""Folder of downloads, and of what was measured on this machine."""


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, made if missing; rename it to ``path`` after the block.

    An ``OSError`` that names no file, such as that of a full disk, is raised with the name ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path | str) -> None:
    """Raise ``InputError`` unless files can be written into ``folder``, which need not exist. Leaves nothing behind."""
    folder = Path(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from error
    finally:
        for place in missing:
            with suppress(OSError):
                place.rmdir()


def check_output(path: Path | str) -> None:
    """Raise ``InputError`` unless a file can be written at ``path``, whose folder must exist."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: its folder does not exist")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    check_writable(path.parent)


@contextmanager
def locked_folder(folder: Path | str) -> Iterator[None]:
    """Let no other program enter this block with the same ``folder``, which is made if missing.

    The lock is on the file ``.lock`` in the folder, and ends with the program however that ends. File systems and
    operating systems without locks give none.

    Raises:
        InputError: another program is in the block; it is named.
    """
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read().strip() or "another program"
                raise InputError(f"{folder} is being written to by {holder}") from error
        else:
            with suppress(OSError):  # a full disk
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
        yield


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_entries(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of :data:`CACHE`; empty if there is none."""
    try:
        entries = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def keep_entry(path: Path, key: str, value: Any) -> None:
    """Add an entry to the JSON object in a file of :data:`CACHE`, if the file can be written."""
    with suppress(OSError):
        write_text(path.expanduser(), json.dumps(read_entries(path) | {key: value}, indent=1) + "\n")


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
