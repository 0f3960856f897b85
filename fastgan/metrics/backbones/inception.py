"""Inception-v3 as the Frechet Inception Distance uses it.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. The weights
are those of the 2015-12-05 TensorFlow graph in PyTorch form, published by the pytorch-fid project.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan._checks import InputError
from fastgan.metrics.backbones.base import Backbone, load_state, load_weights, sha256
from fastgan.metrics.backbones.inception_network import CLASSES, DIMS, InceptionV3
from fastgan.metrics.backbones.inception_weights import HASH_PREFIX, download, local_weights

INPUT_SIZE = 299


def load(
    *,
    weights: str | Path | None = None,
    dims: int | str | None = None,
    device: torch.device | str = "cpu",
    precision: str = "auto",
) -> Backbone:
    """FID's Inception-v3 on 299x299 images.

    ``dims`` is 2048 for the last pooled features (the FID's), 64, 192 or 768 for the averaged maps after the first and
    second max-pool and before the auxiliary head, or ``"logits"`` for the 1008 class scores.

    The weights come from ``weights``, else from the file that FASTGAN_INCEPTION_WEIGHTS names, else from torch.hub's
    cache, into which they are downloaded once. Weights with another hash than the published file's give a backbone of
    another name, so that their distance is not taken for an FID.

    Raises:
        InputError: ``dims`` is none of these, or the weights are missing and cannot be downloaded, are damaged, or do
            not fit.
    """
    dims = DIMS[-1] if dims is None else dims
    if dims not in (*DIMS, "logits"):
        raise InputError(f"dims must be one of {', '.join(map(str, DIMS))} or logits for inception, got {dims}")
    path = Path(weights) if weights is not None else local_weights() or download()
    with torch.device("meta"):  # its 24 million parameters are not drawn only to be replaced
        network = InceptionV3(dims)
    load_state(network, load_weights(path), path, assign=True)
    digest = sha256(path)
    name = "inception" if digest.startswith(HASH_PREFIX) else f"inception-{digest[:8]}"
    return Backbone(
        network.float().eval().fold_batch_norm().to(memory_format=torch.channels_last),
        name=name,
        dim=CLASSES if dims == "logits" else int(dims),
        input_size=INPUT_SIZE,
        normalize=_normalize,
        device=device,
        precision=precision,
        own=True,
        head=UnbiasedHead(network.fc) if dims == DIMS[-1] else None,
        pack=network.pack,
    )


class UnbiasedHead(nn.Module):
    """Class scores without the bias, on which the inception score has been defined since its first implementation
    (Salimans et al., "Improved Techniques for Training GANs", 2016)."""

    weight: Tensor

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", fc.weight.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.to(features.dtype))


def _normalize(pixels: Tensor) -> Tensor:
    return pixels / 127.5 - 1
