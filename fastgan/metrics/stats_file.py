"""The npz files of feature statistics, written whole or not at all; :class:`fastgan.metrics.FeatureStats` reads them.

Keys:
    ``mu`` (dim,) and ``sigma`` (dim, dim): mean and unbiased covariance in float64, as in pytorch-fid's and clean-fid's
    files; files of others with ``mu_s`` and ``sigma_s`` are read too.
    ``n``: number of vectors.
    ``factor`` (n, dim): the centered features, while n <= dim.
    ``root`` (r, dim): :meth:`FeatureStats.root`, if asked for and there is no ``factor``.
    ``features`` (n, dim): the vectors themselves, float32, if asked for.
    ``backbone``, ``protocol``, ``resize``, ``precision``, ``dtype`` (of the features), ``fastgan_version``: strings.

All but ``mu`` and ``sigma`` are left out if they are not known.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastgan._checks import InputError
from fastgan._files import atomic_path, check_output

FEATURES = "features"
"""Key of the features (n, dim), in the order of the images, where they were asked for."""

_MEAN_KEYS, _COV_KEYS = ("mu", "mu_s"), ("sigma", "sigma_s")


def check_statistics_path(path: Path) -> None:
    """Raise ``InputError`` unless an .npz file can be written at ``path``."""
    if path.suffix != ".npz":
        raise InputError(f"statistics are written to an .npz file, got {path}")
    check_output(path)


def write_npz(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write ``arrays`` to the file ``path``, whole or not at all. Raises ``InputError`` if it cannot be written."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def holds_statistics(path: Path) -> bool:
    """Return whether an npz file holds statistics or features rather than images.

    A file that cannot be read counts as one of statistics: reading it then says what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
    except (OSError, zipfile.BadZipFile):
        return True
    return not names or any(key.lower() in (*_MEAN_KEYS, *_COV_KEYS, FEATURES) for key in names)


def moment_keys(path: str | Path, arrays: dict[str, np.ndarray]) -> tuple[str, str]:
    """The keys of mean and covariance, in any case. Raises ``InputError`` naming the file if it lacks one."""
    found = {key.lower(): key for key in arrays}
    keys = [next((found[key] for key in names if key in found), None) for names in (_MEAN_KEYS, _COV_KEYS)]
    if keys[0] is not None and keys[1] is not None:
        return keys[0], keys[1]
    raise InputError(f"{path} must hold mu and sigma (or mu_s and sigma_s), it has: {', '.join(arrays) or 'nothing'}")


def scalar(arrays: dict[str, np.ndarray], key: str, kind: type[int] | type[str]) -> Any:
    """The one integer or string under ``key``, None if the key is missing. Raises ``InputError`` for anything else."""
    if key not in arrays:
        return None
    value = arrays[key]
    if value.size != 1 or value.dtype.kind not in ("iu" if kind is int else "U"):
        name = "integer" if kind is int else "string"
        raise InputError(f"{key} must be one {name}, got dtype {value.dtype} and shape {value.shape}")
    return value.item()
