"""Conditional SAGAN: residual generator and discriminator with self-attention and spectral normalisation.

Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019; the projection head is Miyato & Koyama,
"cGANs with Projection Discriminator", ICLR 2018.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.checks import check_tensor
from fastgan.models.blocks import ConditionalBatchNorm2d, DownBlock, ProjectionHead, UpBlock, init_weights
from fastgan.nn import SelfAttention2d, group_spectral_norm

BASE_RESOLUTION = 4


class SAGANGenerator(nn.Module):
    """Images in [-1, 1] from noise and class labels.

    A linear layer makes a 4x4 map, residual up-blocks with class-conditional batch norm double it up to ``resolution``,
    self-attention follows the block whose output is ``attention_resolution`` wide.

    Args:
        n_classes: number of classes, at least 1.
        resolution: height and width of the images, a power of two, at least 16.
        image_channels: 1 for grey, 3 for RGB.
        dim_z: length of the noise vector.
        width: channels at full resolution, a multiple of 8; doubled at each halving of the resolution.
        max_multiplier: the channels never exceed ``width * max_multiplier``.
        attention_resolution: a power of two from 8 to ``resolution / 2``.
        spectral_norm: normalise every weight of the network by its largest singular value.

    Raises:
        ValueError: an argument is outside its range.
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
        super().__init__()
        _check_architecture(n_classes, resolution, image_channels, width, max_multiplier, attention_resolution)
        if dim_z < 1:
            raise ValueError(f"dim_z must be at least 1, got {dim_z}")
        self.n_classes = n_classes
        self.resolution = resolution
        self.image_channels = image_channels
        self.dim_z = dim_z

        # From the 4x4 map up to the image.
        channels = _channels(resolution, width, max_multiplier)[::-1]
        self.base_channels = channels[0]
        self.linear = nn.Linear(dim_z, channels[0] * BASE_RESOLUTION**2)
        self.blocks = nn.ModuleList(UpBlock(c_in, c_out, n_classes) for c_in, c_out in _pairs(channels))
        self.attention_after = _log2(attention_resolution // BASE_RESOLUTION) - 1
        self.attention = SelfAttention2d(channels[self.attention_after + 1])
        self.norm = ConditionalBatchNorm2d(channels[-1], n_classes)
        self.to_image = nn.Conv2d(channels[-1], image_channels, 3, padding=1)
        init_weights(self)
        if spectral_norm:
            group_spectral_norm(self)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Generate images.

        Args:
            z: noise, (n, dim_z).
            labels: int64 (n,), each in [0, n_classes). The range is not checked here, as that would stall a GPU:
                see :func:`fastgan.models.check_labels`.

        Returns:
            (n, image_channels, resolution, resolution) in [-1, 1].

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        check_tensor("z", z, ndim=2)
        if z.shape[1] != self.dim_z:
            raise ValueError(f"z must have shape (n, {self.dim_z}), got {tuple(z.shape)}")
        _check_label_shape(labels, z.shape[0])
        h = self.linear(z).view(-1, self.base_channels, BASE_RESOLUTION, BASE_RESOLUTION)
        for i, block in enumerate(self.blocks):
            h = block(h, labels)
            if i == self.attention_after:
                h = self.attention(h)
        return torch.tanh(self.to_image(F.relu(self.norm(h, labels))))


class SAGANDiscriminator(nn.Module):
    """Real-or-fake logits of images given their class labels.

    Residual down-blocks halve the resolution to 4x4, self-attention follows the block whose output is
    ``attention_resolution`` wide, one more block keeps the resolution, then come sum pooling and the projection head.
    Arguments as for :class:`SAGANGenerator`.
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
        super().__init__()
        _check_architecture(n_classes, resolution, image_channels, width, max_multiplier, attention_resolution)
        self.n_classes = n_classes
        self.resolution = resolution
        self.image_channels = image_channels

        # From the image down to the 4x4 map; the first block already widens its input to the next level's channels.
        channels = [image_channels, *_channels(resolution, width, max_multiplier)[1:]]
        self.blocks = nn.ModuleList(DownBlock(a, b, first=i == 0) for i, (a, b) in enumerate(_pairs(channels)))
        self.attention_after = _log2(resolution // attention_resolution) - 1
        self.attention = SelfAttention2d(channels[self.attention_after + 1])
        self.last_block = DownBlock(channels[-1], channels[-1], downsample=False)
        self.head = ProjectionHead(channels[-1], n_classes)
        init_weights(self)
        if spectral_norm:
            group_spectral_norm(self)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Score images.

        Args:
            images: (n, image_channels, resolution, resolution) in [-1, 1].
            labels: int64 (n,), each in [0, n_classes); the range is not checked here.

        Returns:
            Logits (n,), positive for real.

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        check_tensor("images", images, ndim=4)
        expected = (self.image_channels, self.resolution, self.resolution)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must have shape (n, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        _check_label_shape(labels, images.shape[0])
        h = images
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i == self.attention_after:
                h = self.attention(h)
        h = F.relu(self.last_block(h)).sum((2, 3))
        return self.head(h, labels)


def check_labels(labels: Tensor, n_classes: int) -> None:
    """Raise ``ValueError`` unless ``labels`` is int64 (n,), each in [0, n_classes). Waits for the device."""
    check_tensor("labels", labels, ndim=1, dtypes=(torch.int64,))
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise ValueError(f"labels must be in [0, {n_classes}), got {int(labels.min())} to {int(labels.max())}")


def _check_label_shape(labels: Tensor, n: int) -> None:
    check_tensor("labels", labels, ndim=1, dtypes=(torch.int64,))
    if labels.shape[0] != n:
        raise ValueError(f"labels must have shape ({n},), one for each sample, got {tuple(labels.shape)}")


def _check_architecture(
    n_classes: int, resolution: int, image_channels: int, width: int, max_multiplier: int, attention_resolution: int
) -> None:
    if n_classes < 1:
        raise ValueError(f"n_classes must be at least 1, got {n_classes}")
    if not _is_power_of_two(resolution) or resolution < 16:
        raise ValueError(f"resolution must be a power of two, at least 16, got {resolution}")
    if image_channels < 1:
        raise ValueError(f"image_channels must be at least 1, got {image_channels}")
    if width < 8 or width % 8:
        raise ValueError(f"width must be a positive multiple of 8, got {width}")
    if max_multiplier < 1:
        raise ValueError(f"max_multiplier must be at least 1, got {max_multiplier}")
    if not _is_power_of_two(attention_resolution) or not 8 <= attention_resolution <= resolution // 2:
        raise ValueError(
            f"attention_resolution must be a power of two from 8 to {resolution // 2}, got {attention_resolution}"
        )


def _channels(resolution: int, width: int, max_multiplier: int) -> list[int]:
    """Channels at ``resolution``, half of it, and so on down to 4x4."""
    levels = _log2(resolution // BASE_RESOLUTION) + 1
    return [width * min(2**level, max_multiplier) for level in range(levels)]


def _pairs(channels: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(channels))


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
