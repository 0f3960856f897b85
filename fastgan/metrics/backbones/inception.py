"""Inception-v3 as the Frechet Inception Distance uses it.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. The weights
are those of the 2015-12-05 TensorFlow graph in PyTorch form, published by the pytorch-fid project.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan._checks import InputError
from fastgan.metrics.backbones.base import Backbone, load_state, load_weights, sha256
from fastgan.metrics.backbones.inception_network import (
    CLASSES,
    DIMS,
    LOGITS,
    SPATIAL,
    SPATIAL_DIM,
    WITH_SPATIAL,
    InceptionV3,
)

INPUT_SIZE = 299

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
HASH_PREFIX = "6726825d"
ENVIRONMENT = "FASTGAN_INCEPTION_WEIGHTS"
OFFLINE = "FASTGAN_OFFLINE"
_CONNECT_SECONDS = 10


def load(
    *,
    weights: str | Path | None = None,
    dims: int | str | None = None,
    device: torch.device | str = "cpu",
    precision: str = "auto",
) -> Backbone:
    """FID's Inception-v3 on 299x299 images.

    ``dims`` is 2048 for the last pooled features (the FID's), 64, 192 or 768 for the averaged maps after the first and
    second max-pool and before the auxiliary head, ``"logits"`` for the 1008 class scores, or
    ``"logits_unbiased"`` for these without their bias. ``"spatial"`` is for sFID's 2023 features (Nash et al.,
    "Generating Images with Sparse Representations", 2021, as guided-diffusion's evaluator takes them), and
    ``"2048+spatial"`` for the FID's with these as :attr:`Backbone.extra`.

    The weights come from ``weights``, else from the file that FASTGAN_INCEPTION_WEIGHTS names, else from torch.hub's
    cache, into which they are downloaded once. Weights with another hash than the published file's give a backbone of
    another name, so that their distance is not taken for an FID.

    Raises:
        InputError: ``dims`` is none of these, or the weights are missing and cannot be downloaded, are damaged, or do
            not fit.
    """
    dims = DIMS[-1] if dims is None else dims
    choices = (*DIMS, SPATIAL, WITH_SPATIAL, *LOGITS)
    if isinstance(dims, bool) or dims not in choices:
        names = ", ".join(map(str, choices))
        raise InputError(f"dims must be one of {names} for inception, got {dims!r}")
    path = Path(weights) if weights is not None else local_weights() or download()
    with torch.device("meta"):  # its 24 million parameters are not drawn only to be replaced
        network = InceptionV3(dims)
    load_state(network, load_weights(path), path, assign=True)
    digest = sha256(path)
    name = "inception" if digest.startswith(HASH_PREFIX) else f"inception-{digest[:8]}"
    return Backbone(
        network.float().eval().fold_batch_norm().to(memory_format=torch.channels_last),
        name=name,
        dim=_number_of_features(dims),
        extra=SPATIAL_DIM if dims == WITH_SPATIAL else 0,
        input_size=INPUT_SIZE,
        normalize="protocol",
        device=device,
        precision=precision,
        own=True,
        head=UnbiasedHead(network.fc) if dims in (DIMS[-1], WITH_SPATIAL) else None,
        pack=network.pack,
    )


def _number_of_features(dims: int | str) -> int:
    if dims in LOGITS:
        return CLASSES
    return {SPATIAL: SPATIAL_DIM, WITH_SPATIAL: DIMS[-1]}.get(str(dims)) or int(dims)


def local_weights() -> Path | None:
    """The weights file that FASTGAN_INCEPTION_WEIGHTS names or that torch.hub's cache holds; None if there is none.

    Raises:
        InputError: the variable names no file, or the cached file is damaged.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        if not Path(named).is_file():
            raise InputError(f"{ENVIRONMENT}={named}: no such file")
        return Path(named)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
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
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
    try:
        if os.environ.get(OFFLINE):
            raise OSError(f"{OFFLINE} is set")
        urlopen(URL, timeout=_CONNECT_SECONDS).close()  # torch.hub would wait for ever
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH_PREFIX)
    except (URLError, OSError, RuntimeError) as error:  # no network, no space, or another file than asked for
        raise InputError(
            f"Inception's weights are not at hand and could not be downloaded ({error}): fetch {URL} and "
            f"put it at {path}, or name it with --weights or {ENVIRONMENT}, or ask for another metric with "
            f"--backbone efficientnet_lite0"
        ) from error
    return path


class UnbiasedHead(nn.Module):
    """Class scores without the bias, on which the inception score has been defined since its first implementation
    (Salimans et al., "Improved Techniques for Training GANs", 2016)."""

    weight: Tensor

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", fc.weight.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.to(features.dtype))
