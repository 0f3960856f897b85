"""Residual generator and discriminator: conditional or not, with or without self-attention and spectral norm.

The blocks are those of Miyato et al. 2018 (SNGAN) and Gulrajani et al. 2017; with attention, conditional batch norm,
the projection head and spectral norm they are SAGAN's (Zhang et al., ICML 2019; Miyato & Koyama, "cGANs with
Projection Discriminator", ICLR 2018), whose sizes are the presets at the end.
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
from fastgan.models.blocks import DownBlock, UpBlock, batch_norm, init_weights, make_head
from fastgan.nn import SelfAttention2d, TokenAttention2d, group_spectral_norm
from fastgan.nn.multihead_self_attention import LOGITS


class ResNetGenerator(Generator):
    """Images in [-1, 1] from noise, and from class labels if there are classes.

    A linear layer makes a map of 4x4 to 7x7, residual up-blocks with batch norm double it up to ``resolution``, and
    self-attention follows the block whose output is ``attention_resolution`` wide.

    Args:
        n_classes: number of classes, each with its row in every batch norm; 0 for an unconditional generator.
        resolution: height and width of the images, 4, 5, 6 or 7 times a power of two, at least 16.
        image_channels: 1 for gray, 3 for RGB.
        dim_z: length of the noise vector.
        width: channels at full resolution, a multiple of 8; doubled at each halving of the resolution.
        max_multiplier: the channels never exceed ``width * max_multiplier``.
        attention_resolution: width of a map, from twice the smallest to ``resolution / 2``; None for no attention.
        attention: "sagan", or the logits of a :class:`fastgan.nn.TokenAttention2d` with 8 channels or more per head:
            "product", "cosine" (with learned sinks) or "distance".
        spectral_norm: normalize every weight of the network by its largest singular value.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> generator = ResNetGenerator(10, width=8)
        >>> generator(torch.randn(2, generator.dim_z), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        n_classes: int = 0,
        *,
        resolution: int = 32,
        image_channels: int = 3,
        dim_z: int = 128,
        width: int = 64,
        max_multiplier: int = 4,
        attention_resolution: int | None = None,
        attention: str = "sagan",
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

        # From the smallest map up to the image.
        channels = channel_levels(resolution, smallest_map(resolution), width, max_multiplier)[::-1]
        self.base_shape = (channels[0], smallest_map(resolution), smallest_map(resolution))
        self.linear = nn.Linear(dim_z, math.prod(self.base_shape))
        self.blocks = nn.ModuleList(UpBlock(c_in, c_out, n_classes) for c_in, c_out in pairwise(channels))
        self.attention_after = attention_index(smallest_map(resolution), attention_resolution)
        if self.attention_after >= 0:
            self.attention = make_attention(attention, channels[self.attention_after + 1])
        self.norm = batch_norm(channels[-1], n_classes)
        self.to_image = nn.Conv2d(channels[-1], image_channels, 3, padding=1)
        init_weights(self)
        if spectral_norm:
            group_spectral_norm(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Generate images.

        Args:
            z: noise, (n, dim_z).
            labels: int64 (n,), each in [0, n_classes), not looked at by an unconditional generator. The range is not
                checked here, as that would stall a GPU: see :func:`fastgan.models.check_labels`.

        Returns:
            (n, image_channels, resolution, resolution) in [-1, 1].

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        check_noise(z, self.dim_z)
        if self.n_classes:
            check_label_shape(labels, z.shape[0], self.n_classes)
        h = self.linear(z).view(-1, *self.base_shape)
        for i, block in enumerate(self.blocks):
            h = block(h, labels)
            if i == self.attention_after:
                h = self.attention(h)
        return torch.tanh(self.to_image(F.relu(self.norm(h, labels))))


class ResNetDiscriminator(nn.Module):
    """Logits of images, given their class labels if there are classes.

    Residual down-blocks halve the resolution to 4x4 (to 7x7), self-attention follows the block whose output is
    ``attention_resolution`` wide, one more block keeps the resolution, then come sum pooling and the head.

    Args:
        head: "plain", "projection" (looks at the labels) or "auxiliary" (gives class logits too).

    Other arguments as for :class:`ResNetGenerator`. There is no batch norm, so a gradient penalty is well defined.

    Example:
        >>> ResNetDiscriminator(10, width=8, head="projection")(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        n_classes: int = 0,
        *,
        resolution: int = 32,
        image_channels: int = 3,
        width: int = 64,
        max_multiplier: int = 4,
        attention_resolution: int | None = None,
        attention: str = "sagan",
        spectral_norm: bool = False,
        head: str = "plain",
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
        self.n_classes = n_classes
        self.resolution = resolution
        self.image_channels = image_channels

        # From the image down to the smallest map; the first block widens its input to the next level's channels.
        channels = [image_channels, *channel_levels(resolution, smallest_map(resolution), width, max_multiplier)[1:]]
        self.blocks = nn.ModuleList(DownBlock(a, b, first=i == 0) for i, (a, b) in enumerate(pairwise(channels)))
        self.attention_after = attention_index(resolution, attention_resolution)
        if self.attention_after >= 0:
            self.attention = make_attention(attention, channels[self.attention_after + 1])
        self.last_block = DownBlock(channels[-1], channels[-1], downsample=False)
        self.head = make_head(head, channels[-1], n_classes)
        init_weights(self)
        if spectral_norm:
            group_spectral_norm(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Score images.

        Args:
            images: (n, image_channels, resolution, resolution) in [-1, 1].
            labels: int64 (n,), each in [0, n_classes), ignored if ``n_classes`` is 0; the range is not
                checked here.

        Returns:
            Logits (n,), positive for real; with an auxiliary head, class logits (n, n_classes) beside them.

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
        h = F.relu(self.last_block(h)).sum((2, 3))
        return self.head(h, labels)


class SAGANGenerator(ResNetGenerator):
    """Images in [-1, 1] from noise and class labels: a conditional :class:`ResNetGenerator` with attention.

    Args:
        n_classes: number of classes, at least 1.
        resolution: height and width of the images, 4, 5, 6 or 7 times a power of two, at least 16.
        image_channels: 1 for gray, 3 for RGB.
        dim_z: length of the noise vector.
        width: channels at full resolution, a multiple of 8; doubled at each halving of the resolution.
        max_multiplier: the channels never exceed ``width * max_multiplier``.
        attention_resolution: width of a map, from twice the smallest to ``resolution / 2``.
        spectral_norm: normalize every weight of the network by its largest singular value.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> generator = SAGANGenerator(10, width=8)
        >>> generator(torch.randn(2, generator.dim_z), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        n_classes: int,
        *,
        resolution: int = 32,
        image_channels: int = 3,
        dim_z: int = 128,
        width: int = 64,
        max_multiplier: int = 4,
        attention_resolution: int = 16,
        spectral_norm: bool = True,
    ) -> None:
        config = recorded(locals())
        _check_conditional(n_classes)
        super().__init__(
            n_classes,
            resolution=resolution,
            image_channels=image_channels,
            dim_z=dim_z,
            width=width,
            max_multiplier=max_multiplier,
            attention_resolution=attention_resolution,
            spectral_norm=spectral_norm,
        )
        self.record(config)


class SAGANDiscriminator(ResNetDiscriminator):
    """Logits of images given their labels: a :class:`ResNetDiscriminator` with attention and a projection head.

    Arguments as for :class:`SAGANGenerator`.

    Example:
        >>> SAGANDiscriminator(10, width=8)(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        n_classes: int,
        *,
        resolution: int = 32,
        image_channels: int = 3,
        width: int = 64,
        max_multiplier: int = 4,
        attention_resolution: int = 16,
        spectral_norm: bool = True,
    ) -> None:
        _check_conditional(n_classes)
        super().__init__(
            n_classes,
            resolution=resolution,
            image_channels=image_channels,
            width=width,
            max_multiplier=max_multiplier,
            attention_resolution=attention_resolution,
            spectral_norm=spectral_norm,
            head="projection",
        )


def make_attention(kind: str, channels: int) -> nn.Module:
    """A residual block of attention over maps (n, channels, h, w): SAGAN's, or of several heads with such logits.

    Raises:
        ValueError: there is none of this name.
    """
    if kind == "sagan":
        return SelfAttention2d(channels)
    if kind not in LOGITS:
        raise ValueError(f"attention must be one of {', '.join(map(repr, ('sagan', *LOGITS)))}, got {kind!r}")
    heads = max(n for n in (1, 2, 4, 8) if channels % n == 0 and channels // n >= 8)
    return TokenAttention2d(channels, heads, logits=kind, sinks=kind == "cosine")


def _check_conditional(n_classes: int) -> None:
    if n_classes < 1:
        raise ValueError(f"n_classes must be at least 1, got {n_classes}")
