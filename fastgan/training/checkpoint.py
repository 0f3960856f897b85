"""Checkpoints that survive a crash, a truncated file or a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from fastgan._checks import InputError
from fastgan._files import atomic_path

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """A checkpoint could not be written because the disk is full; earlier ones are intact."""


class Checkpoints:
    """Checkpoints of a run: the last, the one before it, and the best.

    A file is written beside its place, forced to the disk and moved there, so it is whole or absent.

    Args:
        folder: where they are; made at the first write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def exist(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return any((self.folder / name).exists() for name in (LAST, PREVIOUS, BEST))

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``state`` as the last checkpoint; the last one so far becomes the previous one.

        Raises:
            DiskFullError: there is no room; both files stay as they were.
        """
        self._write(LAST, state)

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Write ``state`` as the best checkpoint. Raises ``DiskFullError`` as :meth:`save`."""
        self._write(BEST, state)

    def load(self, note: Callable[[str], None], device: torch.device | str = "cpu") -> dict[str, Any]:
        """Read the last checkpoint, or the previous or the best one if it cannot be read, and report that to ``note``.

        Raises:
            InputError: none can be read.
        """
        failures = []
        for path in (self.folder / LAST, self.folder / PREVIOUS, self.folder / BEST):
            try:
                state = read_checkpoint(path, device)
            except InputError as error:
                failures.append(str(error))
                continue
            if failures:
                note(f"{'; '.join(failures)}; going on from {path}, step {state['trainer']['step']}")
            return state
        raise InputError(f"there is no checkpoint to go on from: {'; '.join(failures)}")

    def remove_temporary_files(self) -> None:
        """Remove unfinished files of a killed program. No other program may be writing."""
        for name in (LAST, PREVIOUS, BEST):
            for path in self.folder.glob(f".{Path(name).stem}-*.pt"):
                path.unlink(missing_ok=True)

    def _write(self, name: str, state: Mapping[str, Any]) -> None:
        content = BytesIO()
        torch.save(dict(state), content)
        path = self.folder / name
        try:
            with atomic_path(path) as temporary:
                with open(temporary, "wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                if name == LAST and path.exists():
                    os.replace(path, self.folder / PREVIOUS)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise DiskFullError(error.errno, f"no room for {path}: {error.strerror}") from error
            raise


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read one checkpoint. Nothing but tensors and plain values is unpickled.

    Raises:
        InputError: it does not exist, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["trainer"]["step"]
    except Exception as error:  # torch.load raises whatever the damage leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged ({reason})") from error
    return state
