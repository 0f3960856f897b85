"""Images from sketches and class labels: an encoder-decoder and an instance-normed critic.

The sketch stands in the place of noise; the label is embedded in both networks; the decoder up-samples bilinearly,
which leaves no checkerboard. Trained as WGAN-GP (Gulrajani et al. 2017) on paired or unpaired sketches.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.models.base import (
    Generator,
    channel_levels,
    check_architecture,
    check_images,
    check_label_shape,
    recorded,
    smallest_map,
)
from fastgan.models.dcgan import init_dcgan

SMALLEST_MAP = 8
"""Least width of the smallest maps: sketches keep more of their geometry than 4x4 holds."""


class SketchGenerator(Generator):
    """Images in [-1, 1] from sketches and class labels.

    Strided convolutions take the sketch down to 8x8 (up to 15x15), the label's embedding joins the channels there, and
    bilinear up-sampling and convolutions with batch norm make the image.

    Args:
        n_classes: number of classes, at least 1.
        resolution: height and width of sketches and images, 4, 5, 6 or 7 times a power of two, at least 16.
        image_channels: 1 for gray, 3 for RGB.
        sketch_channels: of the sketches.
        width: channels at half the resolution, a multiple of 8; doubled at each further halving.
        max_multiplier: the channels never exceed ``width * max_multiplier``.
        label_channels: length of the label's embedding.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> generator = SketchGenerator(10, resolution=32, width=8)
        >>> generator(torch.randn(2, 1, 32, 32), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 32, 32])
    """

    dim_z = 0

    def __init__(
        self,
        n_classes: int,
        *,
        resolution: int = 64,
        image_channels: int = 3,
        sketch_channels: int = 1,
        width: int = 64,
        max_multiplier: int = 4,
        label_channels: int = 32,
    ) -> None:
        config = recorded(locals())
        super().__init__()
        _check(n_classes, resolution, image_channels, sketch_channels, width, max_multiplier)
        if label_channels < 1:
            raise ValueError(f"label_channels must be at least 1, got {label_channels}")
        self.record(config)

        channels = channel_levels(resolution // 2, smallest_map(resolution, SMALLEST_MAP), width, max_multiplier)
        self.encoder = nn.Sequential(
            *(_encode(a, b, first=i == 0) for i, (a, b) in enumerate(pairwise([sketch_channels, *channels])))
        )
        self.embed = nn.Embedding(n_classes, label_channels)
        self.join = _convolve(channels[-1] + label_channels, channels[-1])
        self.decoder = nn.ModuleList(_convolve(a, b) for a, b in pairwise([*channels[::-1], channels[0]]))
        self.to_image = nn.Conv2d(channels[0], image_channels, 3, padding=1)
        init_dcgan(self)
        nn.init.normal_(self.embed.weight)

    def forward(self, sketches: Tensor, labels: Tensor) -> Tensor:
        """Images (n, image_channels, resolution, resolution) of sketches (n, sketch_channels, resolution, resolution)
        in [-1, 1] and int64 labels (n,).

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        check_images(sketches, self.sketch_channels, self.resolution, "sketches")
        check_label_shape(labels, sketches.shape[0], self.n_classes)
        h = self.encoder(sketches)
        code = self.embed(labels)[:, :, None, None].to(h.dtype)
        h = self.join(torch.cat([h, code.expand(-1, -1, *h.shape[2:])], 1))
        for block in self.decoder:
            h = block(F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False))
        return torch.tanh(self.to_image(h))


class SketchDiscriminator(nn.Module):
    """Wasserstein critic: the label's embedding joins the image as one more channel; instance norm, LeakyReLU.

    Args:
        sees_sketch: the sketch joins the image's channels too; the data must then be paired.

    Other arguments as for :class:`SketchGenerator`.

    Example:
        >>> critic = SketchDiscriminator(10, resolution=32, width=8)
        >>> critic(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        n_classes: int,
        *,
        resolution: int = 64,
        image_channels: int = 3,
        sketch_channels: int = 1,
        width: int = 64,
        max_multiplier: int = 4,
        sees_sketch: bool = False,
    ) -> None:
        super().__init__()
        _check(n_classes, resolution, image_channels, sketch_channels, width, max_multiplier)
        self.n_classes = n_classes
        self.resolution = resolution
        self.image_channels = image_channels
        self.sees_sketch = sees_sketch
        self.in_channels = image_channels + (sketch_channels if sees_sketch else 0)

        self.embed = nn.Embedding(n_classes, resolution**2)
        channels = [
            self.in_channels + 1,
            *channel_levels(resolution // 2, smallest_map(resolution, SMALLEST_MAP), width, max_multiplier),
        ]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(channels)):
            layers.append(nn.Conv2d(a, b, 4, 2, 1, bias=i == 0))
            if i:
                layers.append(nn.InstanceNorm2d(b, affine=True))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1] * smallest_map(resolution, SMALLEST_MAP) ** 2, 1)
        init_dcgan(self)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Score images (n, image_channels, resolution, resolution), with the channels of their sketches appended if
        ``sees_sketch``, for int64 labels (n,); returns (n,).

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        check_images(images, self.in_channels, self.resolution)
        check_label_shape(labels, images.shape[0], self.n_classes)
        code = self.embed(labels).view(-1, 1, self.resolution, self.resolution).to(images.dtype)
        return self.head(self.layers(torch.cat([images, code], 1)).flatten(1)).squeeze(1)


def _check(
    n_classes: int, resolution: int, image_channels: int, sketch_channels: int, width: int, max_multiplier: int
) -> None:
    if n_classes < 1:
        raise ValueError(f"n_classes must be at least 1, got {n_classes}")
    if sketch_channels < 1:
        raise ValueError(f"sketch_channels must be at least 1, got {sketch_channels}")
    check_architecture(
        n_classes=n_classes,
        resolution=resolution,
        image_channels=image_channels,
        width=width,
        max_multiplier=max_multiplier,
    )


def _encode(in_channels: int, out_channels: int, *, first: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=first)]
    if not first:
        layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers, nn.LeakyReLU(0.2))


def _convolve(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
