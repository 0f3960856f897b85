"""Feature statistics on disk: npz files, written atomically, read without pickle."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

import fastgan
from fastgan._checks import InputError
from fastgan._files import atomic_path
from fastgan.data.archives import read_npz
from fastgan.metrics.stats import FeatureStats

# (mean, covariance) as named by fastgan, pytorch-fid and clean-fid, and by others
_MOMENT_KEYS = (("mu", "sigma"), ("mu_s", "sigma_s"))


def save_stats(
    stats: FeatureStats, path: str | Path, *, root: bool = False, extra: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write ``stats`` to ``path`` (exactly that name) as an npz file, whole or not at all.

    Keys: ``mu`` (dim,) and ``sigma`` (dim, dim) in float64, as pytorch-fid and clean-fid expect; ``n``; ``factor``, the
    centred features (n, dim), while n <= dim; ``backbone``, ``resize``, ``precision``, ``dtype`` (of the
    features) and ``fastgan_version``. What is not known is left out. ``extra`` arrays are written beside these.

    ``root=True`` writes also ``root`` (r, dim), :meth:`FeatureStats.root`, where there is no ``factor``: distances to
    the statistics read again then factor them no more. It makes the file twice as large, by 32 MB at dim 2048.

    Raises:
        InputError: fewer than two feature vectors, a covariance with a clearly negative eigenvalue where its root is
            asked for, or the folder of ``path`` does not exist.
    """
    arrays: dict[str, np.ndarray] = {"mu": stats.mean.cpu().numpy(), "sigma": stats.cov.cpu().numpy()}
    if stats.n is not None:
        arrays["n"] = np.array(stats.n, dtype=np.int64)
    factor = stats.factor
    if factor is not None:
        arrays["factor"] = factor.cpu().numpy()
    elif root:
        arrays["root"] = stats.root().cpu().numpy()
    texts = {
        "backbone": stats.backbone,
        "resize": stats.resize,
        "precision": stats.precision,
        "dtype": stats.dtype,
        "fastgan_version": fastgan.__version__,
    }
    arrays |= {key: np.array(text) for key, text in texts.items() if text is not None}
    _write(Path(path), arrays | dict(extra or {}))


def load_stats(path: str | Path, *, device: torch.device | str = "cpu") -> FeatureStats:
    """Read statistics written by :func:`save_stats`, by pytorch-fid or clean-fid (``mu``, ``sigma``), or with keys
    ``mu_s``, ``sigma_s``. Files without ``n`` give statistics with ``n = None``. Nothing is unpickled.

    Raises:
        InputError: there is no such file, it is damaged or holds pickled objects, or its arrays do not fit together.
    """
    path = Path(path)
    arrays = read_npz(path)
    mu_key, sigma_key = _moment_keys(path, arrays)
    try:
        n = _integer(arrays, "n")
        stats = FeatureStats.from_moments(
            arrays[mu_key],
            arrays[sigma_key],
            n=n,
            factor=arrays.get("factor"),
            root=arrays.get("root"),
            backbone=_text(arrays, "backbone"),
            resize=_text(arrays, "resize"),
            precision=_text(arrays, "precision"),
        )
        stats.dtype = _text(arrays, "dtype")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from error
    return stats.to(device)


def holds_statistics(path: Path) -> bool:
    """Whether an npz file is one of statistics: not where every one of its arrays may be images. A file that cannot be
    read is taken for one, so that :func:`load_stats` says why it cannot."""
    try:
        with zipfile.ZipFile(path) as file:
            names = {name.removesuffix(".npy") for name in file.namelist()}
    except (OSError, zipfile.BadZipFile):
        return True
    return not names or any({mu, sigma} & names for mu, sigma in _MOMENT_KEYS)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _moment_keys(path: Path, arrays: dict[str, np.ndarray]) -> tuple[str, str]:
    for mu_key, sigma_key in _MOMENT_KEYS:
        if mu_key in arrays and sigma_key in arrays:
            return mu_key, sigma_key
    raise InputError(f"{path} must hold mu and sigma (or mu_s and sigma_s), it has: {', '.join(arrays) or 'nothing'}")


def _integer(arrays: dict[str, np.ndarray], key: str) -> int | None:
    if key not in arrays:
        return None
    value = arrays[key]
    if value.size != 1 or not np.issubdtype(value.dtype, np.integer):
        raise InputError(f"{key} must be one integer, got dtype {value.dtype} and shape {value.shape}")
    return int(value.item())


def _text(arrays: dict[str, np.ndarray], key: str) -> str | None:
    if key not in arrays:
        return None
    value = arrays[key]
    if value.size != 1 or value.dtype.kind != "U":
        raise InputError(f"{key} must be one string, got dtype {value.dtype} and shape {value.shape}")
    return str(value.item())
