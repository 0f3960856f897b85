"""DCGAN and what grew from it: convolutional networks without residual paths.

Radford et al., "Unsupervised Representation Learning with Deep Convolutional GANs", ICLR 2016. With ``n_classes`` the
generator takes the one-hot label beside its noise; the discriminator takes it as a projection, as one-hot maps joined
after its attention (conditional self-attention Wasserstein GAN), or predicts it (ACGAN).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.models.base import (
    Generator,
    attention_index,
    channel_levels,
    check_architecture,
    check_images,
    check_label_shape,
    check_noise,
    recorded,
    smallest_map,
)
from fastgan.models.blocks import HEADS, join_one_hot, make_head
from fastgan.nn import SelfAttention2d, group_spectral_norm

NORMS = ("none", "batch", "instance", "spectral")
DCGAN_HEADS = (*HEADS, "one-hot")


class DCGANGenerator(Generator):
    """Images in [-1, 1] from noise: dense layer, transposed convolutions, batch norm, ReLU, tanh.

    Args:
        n_classes: number of classes, whose one-hot code is joined to the noise; 0 for an unconditional generator.
        resolution: height and width of the images, 4, 5, 6 or 7 times a power of two, at least 16.
        image_channels: 1 for gray, 3 for RGB.
        dim_z: length of the noise vector.
        width: channels at half the resolution, a multiple of 8; doubled at each further halving.
        max_multiplier: the channels never exceed ``width * max_multiplier``. The original 64x64 network (512, 256,
            128, 64) has ``width=64, max_multiplier=8``.
        attention_resolution: width of the maps that self-attention works on, from twice the smallest map's width to
            ``resolution / 2``; None for none.
        spectral_norm: normalize every weight of the network by its largest singular value.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> generator = DCGANGenerator(10, resolution=32, width=8)
        >>> generator(torch.randn(2, generator.dim_z), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        n_classes: int = 0,
        *,
        resolution: int = 64,
        image_channels: int = 3,
        dim_z: int = 100,
        width: int = 64,
        max_multiplier: int = 8,
        attention_resolution: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        config = recorded(locals())
        super().__init__()
        check_architecture(
            n_classes=n_classes,
            resolution=resolution,
            image_channels=image_channels,
            width=width,
            max_multiplier=max_multiplier,
            attention_resolution=attention_resolution,
            dim_z=dim_z,
        )
        self.record(config)

        channels = channel_levels(resolution // 2, smallest_map(resolution), width, max_multiplier)[::-1]
        self.base_shape = (channels[0], smallest_map(resolution), smallest_map(resolution))
        self.linear = nn.Linear(dim_z + n_classes, math.prod(self.base_shape), bias=False)
        self.norm = nn.BatchNorm2d(channels[0])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(channels)
        )
        self.attention_after = attention_index(smallest_map(resolution), attention_resolution)
        if self.attention_after >= 0:
            self.attention = SelfAttention2d(channels[self.attention_after + 1])
        self.to_image = nn.ConvTranspose2d(channels[-1], image_channels, 4, 2, 1)
        init_dcgan(self)
        if spectral_norm:
            group_spectral_norm(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (n, image_channels, resolution, resolution) of noise (n, dim_z) and int64 labels (n,).

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        check_noise(z, self.dim_z)
        if self.n_classes:
            check_label_shape(labels, z.shape[0], self.n_classes)
            assert labels is not None
            z = join_one_hot(z, labels, self.n_classes)
        h = F.relu(self.norm(self.linear(z).view(-1, *self.base_shape)))
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i == self.attention_after:
                h = self.attention(h)
        return torch.tanh(self.to_image(h))


class DCGANDiscriminator(nn.Module):
    """Logits of images: strided convolutions, a norm, LeakyReLU.

    Args:
        norm: of all layers but the first and the last: "batch", "instance", "none"; or "spectral", of every weight.
            With a gradient penalty batch norm is not allowed, as a sample has then no gradient of its own.
        dropout: probability after each layer but the last, as in the ACGAN paper; 0 for none.
        head: "plain", "projection", "auxiliary" (gives class logits too) or "one-hot": the label's one-hot maps join
            the channels after the attention, or after the first layer without attention.
        width: channels at half the resolution; other arguments as for :class:`DCGANGenerator`.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> DCGANDiscriminator(resolution=32, width=8)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        n_classes: int = 0,
        *,
        resolution: int = 64,
        image_channels: int = 3,
        width: int = 64,
        max_multiplier: int = 8,
        attention_resolution: int | None = None,
        norm: str = "batch",
        head: str = "plain",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_architecture(
            n_classes=n_classes,
            resolution=resolution,
            image_channels=image_channels,
            width=width,
            max_multiplier=max_multiplier,
            attention_resolution=attention_resolution,
        )
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
        if head not in DCGAN_HEADS:
            raise ValueError(f"head must be one of {', '.join(map(repr, DCGAN_HEADS))}, got {head!r}")
        if head == "one-hot" and n_classes < 1:
            raise ValueError(f"head 'one-hot' needs n_classes of at least 1, got {n_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.n_classes = n_classes
        self.resolution = resolution
        self.image_channels = image_channels

        channels = [image_channels, *channel_levels(resolution // 2, smallest_map(resolution), width, max_multiplier)]
        self.attention_after = attention_index(resolution, attention_resolution)
        if self.attention_after >= 0:
            self.attention = SelfAttention2d(channels[self.attention_after + 1])
        self.join_after = max(self.attention_after, 0) if head == "one-hot" else -1
        extra = [n_classes if i == self.join_after + 1 and head == "one-hot" else 0 for i in range(len(channels) - 1)]
        self.blocks = nn.ModuleList(
            _down(a + more, b, norm if i else "none", dropout)
            for i, ((a, b), more) in enumerate(zip(pairwise(channels), extra, strict=True))
        )
        features = channels[-1] * smallest_map(resolution) ** 2
        self.head = make_head("plain" if head == "one-hot" else head, features, n_classes)
        init_dcgan(self)
        if norm == "spectral":
            group_spectral_norm(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (n,) of images (n, image_channels, resolution, resolution) and int64 labels (n,); with an auxiliary
        head, class logits (n, n_classes) beside them.

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        check_images(images, self.image_channels, self.resolution)
        if self.n_classes:
            check_label_shape(labels, images.shape[0], self.n_classes)
        h = images
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i == self.attention_after:
                h = self.attention(h)
            if i == self.join_after:
                assert labels is not None
                h = join_one_hot(h, labels, self.n_classes)
        return self.head(h.flatten(1), labels)


def _down(in_channels: int, out_channels: int, norm: str, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=norm not in ("batch", "instance"))]
    if norm == "batch":
        layers.append(nn.BatchNorm2d(out_channels))
    if norm == "instance":
        layers.append(nn.InstanceNorm2d(out_channels, affine=True))
    return nn.Sequential(*layers, nn.LeakyReLU(0.2), *([nn.Dropout(dropout)] if dropout else []))


def init_dcgan(root: nn.Module) -> None:
    """Normal weights of deviation 0.02, zero biases and unit gains below ``root``, in place, as in the paper."""
    for module in root.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, 0.02)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
