"""Classes from a file beside the images: ``dataset.json`` as StyleGAN's tools write it, or ``labels.csv``."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

from fastgan._checks import InputError
from fastgan.data.find import LABEL_FILES
from fastgan.data.image_sources import ImageSource, numbered_classes

_NAMED = 3  # files listed in a message


def read_label_file(root: str | Path, images: ImageSource) -> tuple[tuple[str, ...], list[int]] | None:
    """Read class names and the class of each image from the label file of a folder or zip file; None if it has none.

    ``dataset.json`` holds ``{"labels": [["00000/img00000.png", 6], ...]}``, or null for no classes; each row of
    ``labels.csv`` a path below ``root`` and a label, perhaps under a header. Labels are numbers from 0, or names, which
    are numbered in their order.

    Raises:
        InputError: the file is damaged, or an image has no label or two in it.
    """
    root = Path(root)
    for name, parse in zip(LABEL_FILES, (_of_json, _of_csv), strict=True):
        text = _text(root, name)
        rows = None if text is None else parse(text, f"{root}/{name}")
        if rows:
            return _labels(rows, images, f"{root}/{name}")
    return None


def _text(root: Path, name: str) -> str | None:
    try:
        if root.is_dir():
            return (root / name).read_text(encoding="utf-8-sig") if (root / name).is_file() else None
        if zipfile.is_zipfile(root):
            with zipfile.ZipFile(root) as file:
                return file.read(name).decode("utf-8-sig") if name in file.namelist() else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{root}/{name} cannot be read: {error}") from error
    return None


def _of_json(text: str, where: str) -> dict[str, str]:
    try:
        found = [(str(path), label) for path, label in json.loads(text)["labels"] or []]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} must hold 'labels', a list of [path, label] or null: {error}") from error
    for path, label in found:
        is_number = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if not is_number and not isinstance(label, str):
            raise InputError(f"labels of {where} must be whole numbers from 0 or names, got {label!r} for {path}")
    return _unambiguous([(path, str(label)) for path, label in found], where)


def _of_csv(text: str, where: str) -> dict[str, str]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if short := next((row for row in rows if len(row) < 2), None):
        raise InputError(f"{where} must have rows of a path and a label, got {','.join(short)!r}")
    return _unambiguous([(row[0].strip(), row[1].strip()) for row in rows], where)


def _unambiguous(rows: list[tuple[str, str]], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, label in rows:
        if found.setdefault(path, label) != label:
            raise InputError(f"{where} has two labels for {path}: {found[path]} and {label}")
    return found


def _labels(rows: dict[str, str], images: ImageSource, where: str) -> tuple[tuple[str, ...], list[int]]:
    keys = [images.key(i) for i in range(len(images))]
    missing = [key for key in keys if key not in rows]
    if missing:
        listed = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise InputError(f"{where} has no label for {len(missing)} of {len(keys)} images: {listed}")
    found = {rows[key] for key in keys}
    if all(label.isdecimal() for label in found):
        labels = [int(rows[key]) for key in keys]
        return numbered_classes(labels, where), labels
    names = tuple(sorted(found))
    number = {name: i for i, name in enumerate(names)}
    return names, [number[rows[key]] for key in keys]
