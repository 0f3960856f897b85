"""Inception-v3 as the Frechet Inception Distance uses it: torchvision's network with the TensorFlow graph's poolings.

The weights are those of the 2015-12-05 TensorFlow graph in PyTorch form, published by the pytorch-fid project. Heusel
et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017; Szegedy et al.,
"Rethinking the Inception Architecture for Computer Vision", 2015.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as tv

from fastgan.metrics.backbones.base import Backbone, fold_batch_norm, load_state, load_weights, sha256
from fastgan.metrics.backbones.inception_weights import HASH_PREFIX, download, local_weights
from fastgan.metrics.errors import InputError

DIMS = (64, 192, 768, 2048)
CLASSES = 1008
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
    network = InceptionV3(dims)
    load_state(network, load_weights(path), path)
    network.eval()
    digest = sha256(path)
    name = "inception" if digest.startswith(HASH_PREFIX) else f"inception-{digest[:8]}"
    return Backbone(
        network.fold_batch_norm().to(memory_format=torch.channels_last),
        name=name,
        dim=CLASSES if dims == "logits" else int(dims),
        input_size=INPUT_SIZE,
        normalize=_normalize,
        device=device,
        precision=precision,
        own=True,
        head=UnbiasedHead(network.fc) if dims == DIMS[-1] else None,
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


class InceptionV3(tv.Inception3):
    """(n, 3, 299, 299) images in [-1, 1] to pooled features (n, dims) in float32, or to (n, 1008) logits.

    The average pools of the A, C and first E blocks do not count padding, and the last E block pools by maximum.
    """

    def __init__(self, dims: int | str = DIMS[-1]) -> None:
        super().__init__(
            num_classes=CLASSES,
            aux_logits=False,
            transform_input=False,
            inception_blocks=[
                tv.BasicConv2d,
                InceptionA,
                tv.InceptionB,
                InceptionC,
                tv.InceptionD,
                InceptionE,
                tv.InceptionAux,
            ],
            init_weights=False,
        )
        self.dims = dims
        self.Mixed_7c.pool = _max_pool

    def forward(self, images: Tensor) -> Tensor:
        x = self._maps(images).float().mean(dim=(2, 3))
        return F.linear(x, self.fc.weight.float(), self.fc.bias.float()) if self.dims == "logits" else x

    def _maps(self, images: Tensor) -> Tensor:
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images))))
        if self.dims == 64:
            return x
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        if self.dims == 192:
            return x
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        if self.dims == 768:
            return x
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))

    def fold_batch_norm(self) -> InceptionV3:
        """Fold every batch normalisation into the convolution before it; the outputs stay, in eval mode."""
        for module in self.modules():
            if isinstance(module, tv.BasicConv2d) and not isinstance(module.bn, nn.Identity):
                fold_batch_norm(module, "conv", "bn")
        return self


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


class InceptionA(tv.InceptionA):
    """torchvision's block, the average pool apart."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average_pool(x)),
        ]


class InceptionC(tv.InceptionC):
    """torchvision's block, the average pool apart."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average_pool(x)),
        ]


class InceptionE(tv.InceptionE):
    """torchvision's block, the pool apart."""

    pool = staticmethod(_average_pool)

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(self.pool(x)),
        ]


def _normalize(pixels: Tensor) -> Tensor:
    return pixels / 127.5 - 1
