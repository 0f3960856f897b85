"""Where FID's Inception weights come from: a named file, torch.hub's cache, or one download into it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch

from fastgan._checks import InputError
from fastgan.metrics.backbones.base import sha256

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
HASH_PREFIX = "6726825d"
ENVIRONMENT = "FASTGAN_INCEPTION_WEIGHTS"
OFFLINE = "FASTGAN_OFFLINE"
_CONNECT_SECONDS = 10


def local_weights() -> Path | None:
    """The weights file that FASTGAN_INCEPTION_WEIGHTS names or that torch.hub's cache holds; None where there is none.

    Raises:
        InputError: the variable names no file, or the cached file is damaged.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        if not Path(named).is_file():
            raise InputError(f"{ENVIRONMENT}={named}: no such file")
        return Path(named)
    cached = _cache_path()
    if not cached.is_file():
        return None
    if not sha256(cached).startswith(HASH_PREFIX):
        raise InputError(
            f"{cached} is damaged: its SHA-256 does not begin with {HASH_PREFIX}; delete it and fetch {URL}"
        )
    return cached


def download() -> Path:
    """Fetch the weights into torch.hub's cache, hash checked; not where FASTGAN_OFFLINE is set.

    Raises:
        InputError: they cannot be had; the message says what to put where.
    """
    path = _cache_path()
    try:
        if os.environ.get(OFFLINE):
            raise OSError(f"{OFFLINE} is set")
        urlopen(URL, timeout=_CONNECT_SECONDS).close()  # torch.hub would wait for ever
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH_PREFIX)
    except (URLError, OSError, RuntimeError) as error:  # no network, no space, or another file than asked for
        raise InputError(
            f"Inception's weights are not at hand and could not be downloaded ({error}): fetch {URL} and "
            f"put it at {path}, or name it with --weights or {ENVIRONMENT}"
        ) from error
    return path


def _cache_path() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
