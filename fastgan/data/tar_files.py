"""Tar files of images, and WebDataset shards: several of them, with the class of ``a.png`` in ``a.cls``."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from threading import Lock

import numpy as np

from fastgan._checks import InputError
from fastgan.data.decode import decode_image
from fastgan.data.find import no_images, select_images
from fastgan.data.image_sources import ImageSource, classes_of_folders

_CLASS = ".cls"


class ImageTar(ImageSource):
    """All images in one or several tar files, shard by shard, in the order of their names; compressed ones as well,
    which are read into memory.

    Raises:
        InputError: a file is damaged, or there are no images.
    """

    def __init__(self, paths: Sequence[str | Path], *, label: str | None = None, skip_bad: bool = False) -> None:
        super().__init__(label or str(paths[0]), skip_bad=skip_bad)
        self._paths = [str(path) for path in paths]
        self._files: list[tarfile.TarFile] = []
        self._members: list[tuple[int, tarfile.TarInfo]] = []
        self._classes: dict[tuple[int, PurePath], int] = {}
        self._lock = Lock()
        left_out = []
        for shard, path in enumerate(paths):
            try:
                file = tarfile.open(path)  # noqa: SIM115  # open as long as the source is
                members = {PurePath(member.name): member for member in file.getmembers() if member.isfile()}
            except (OSError, EOFError, tarfile.TarError) as error:
                raise InputError(f"{path} cannot be read as a tar file: {error}") from error
            self._files.append(file)
            found = select_images(name for name in members if name.suffix != _CLASS)
            self._members += [(shard, members[name]) for name in found.paths]
            left_out += [line] if (line := found.left_out_line()) else []
            for name, member in members.items():
                if name.suffix == _CLASS:
                    self._classes[shard, name.with_suffix("")] = self._class(file, member, path)
        if not self._members:
            raise InputError(no_images(self.label, select_images([])))
        self.left_out = "; ".join(left_out)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, index: int) -> np.ndarray:
        return decode_image(self.content(index), self.name(index), self.decoding)

    def content(self, index: int) -> bytes:
        shard, member = self._members[index]
        try:
            with self._lock:  # one file handle for all threads
                content = self._files[shard].extractfile(member)
                return b"" if content is None else content.read()
        except (OSError, EOFError, tarfile.TarError) as error:
            raise InputError(f"{self.name(index)} cannot be read: {error}") from error

    def key(self, index: int) -> str:
        return self._members[index][1].name

    def name(self, index: int) -> str:
        shard, member = self._members[index]
        return f"{self._paths[shard]}/{member.name}"

    def classes(self) -> tuple[tuple[str, ...], list[int]]:
        if not self._classes:
            return classes_of_folders([PurePath(member.name) for _, member in self._members])
        labels = []
        for index, (shard, member) in enumerate(self._members):
            key = (shard, PurePath(member.name).with_suffix(""))
            if key not in self._classes:
                raise InputError(f"{self.name(index)} has no class beside it, as others have in {_CLASS} files")
            labels.append(self._classes[key])
        return tuple(map(str, range(max(labels) + 1))), labels

    def _identity(self, index: int) -> str:
        shard, member = self._members[index]
        return f"{self._paths[shard]}:{member.name}:{member.size}:{member.mtime}"

    @staticmethod
    def _class(file: tarfile.TarFile, member: tarfile.TarInfo, path: str | Path) -> int:
        content = file.extractfile(member)
        text = b"" if content is None else content.read()
        if not text.strip().isdigit():
            raise InputError(f"{path}/{member.name} must hold a class, an integer from 0, got {text[:20]!r}")
        return int(text)
