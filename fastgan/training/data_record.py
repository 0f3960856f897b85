"""``data.json`` in a run's folder records the data that it is trained on, so that other data is noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastgan._checks import InputError
from fastgan._files import write_text
from fastgan.data import DataSplit, LabeledImages
from fastgan.data.fingerprint import changes

RECORD = "data.json"


@dataclass(frozen=True)
class DataRecord:
    """The data of a run.

    Attributes:
        found: the line that describes it.
        train, held_out: number of images of each class, in the order of the labels.
        class_names: one per class, or none.
        files: CRC-32 of each file, by its path below the data's folder; none for named data sets.
    """

    found: str
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataSplit) -> DataRecord:
        """The record of ``data``."""
        return cls(data.found, _counts(data.train), _counts(data.held_out), data.train.class_names, data.files)

    @classmethod
    def read(cls, out: str | Path) -> DataRecord | None:
        """Read the record of the run in ``out``; None for a run of an earlier release, which has none.

        Raises:
            InputError: it is damaged.
        """
        path = Path(out) / RECORD
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tuples = {name: tuple(content[name]) for name in ("train", "held_out", "class_names")}
            return cls(content["found"], **tuples, files=dict(content["files"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error

    def write(self, out: Path) -> None:
        """Write the record into ``out``."""
        write_text(out / RECORD, json.dumps(asdict(self), indent=1) + "\n")

    def check(self, data: DataSplit, source: str, out: str | Path) -> None:
        """Raise ``InputError`` unless ``data`` has the same files and as many images of each class; it says which."""
        if differing := changes(self.files, data.files):
            raise InputError(f"{source} must hold the images that {out} is trained on: {differing}")
        now = DataRecord.of(data)
        if (now.train, now.held_out) != (self.train, self.held_out):
            raise InputError(
                f"{source} must hold the images that {out} is trained on, {self.found}; there are {now.found}"
            )


def _counts(data: LabeledImages) -> tuple[int, ...]:
    return tuple(data.labels.bincount(minlength=data.n_classes).tolist())
