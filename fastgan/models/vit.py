"""A vision transformer as discriminator: R1, R2 and WGAN-GP go through its attention twice, in O(tokens) memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.models.base import check_architecture, check_images, check_label_shape
from fastgan.models.blocks import init_weights, make_head
from fastgan.nn import MultiheadSelfAttention, group_spectral_norm


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention, then a perceptron of one hidden layer, each added to its input.

    Args:
        channels: C, a multiple of ``num_heads``.
        num_heads, logits, sinks: as in :class:`fastgan.nn.MultiheadSelfAttention`.
        expansion: the perceptron's hidden units over C.

    Shape:
        x (n, tokens, C) -> (n, tokens, C).

    Example:
        >>> TransformerBlock(16, 4)(torch.randn(2, 10, 16)).shape
        torch.Size([2, 10, 16])
    """

    def __init__(
        self, channels: int, num_heads: int, *, logits: str = "product", sinks: bool = False, expansion: int = 2
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = MultiheadSelfAttention(channels, num_heads, logits=logits, sinks=sinks)
        self.hidden = nn.Linear(channels, expansion * channels)
        self.out = nn.Linear(expansion * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after attention and perceptron."""
        x = x + self.attention(self.norm1(x))
        return x + self.out(F.gelu(self.hidden(self.norm2(x))))


class ViTDiscriminator(nn.Module):
    """Logits of images, given their class labels if there are classes, by a vision transformer.

    Patches become tokens with a learned position, ``depth`` blocks follow, and the mean of the tokens goes to the head.

    Args:
        n_classes: number of classes; 0 for an unconditional discriminator.
        resolution: height and width of the images, 4, 5, 6 or 7 times a power of two, at least 16.
        image_channels: 1 for gray, 3 for RGB.
        width: channels of the tokens, a multiple of 8 and of ``num_heads``.
        depth: number of blocks.
        num_heads: heads of each.
        patch: height and width of a patch, a divisor of ``resolution``; None for 8 patches per side, or 5 or 7 if
            the resolution is 20 or 28.
        attention: logits of the attention: "product", "cosine" (with learned sinks) or "distance", as in
            :class:`fastgan.nn.MultiheadSelfAttention`.
        spectral_norm: normalize every weight of the network by its largest singular value.
        head: "plain", "projection" (looks at the labels) or "auxiliary" (gives class logits too).

    Raises:
        ValueError: an argument is outside its range.

    Source: Dosovitskiy et al. 2021 (ViT), arXiv 2010.11929; Lee et al. 2022 (ViTGAN), arXiv 2107.04589.

    Example:
        >>> ViTDiscriminator(resolution=16, image_channels=1, width=32)(torch.randn(2, 1, 16, 16)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        n_classes: int = 0,
        *,
        resolution: int = 32,
        image_channels: int = 3,
        width: int = 192,
        depth: int = 4,
        num_heads: int = 4,
        patch: int | None = None,
        attention: str = "product",
        spectral_norm: bool = False,
        head: str = "plain",
    ) -> None:
        super().__init__()
        check_architecture(
            n_classes=n_classes, resolution=resolution, image_channels=image_channels, width=width, max_multiplier=1
        )
        patch = (resolution // 8 if resolution % 8 == 0 else 4) if patch is None else patch
        if patch < 1 or resolution % patch:
            raise ValueError(f"patch must divide resolution, {resolution}, got {patch}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.n_classes = n_classes
        self.resolution = resolution
        self.image_channels = image_channels
        self.to_tokens = nn.Conv2d(image_channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, logits=attention, sinks=attention == "cosine") for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = make_head(head, width, n_classes)
        init_weights(self)
        self.position = nn.Parameter(0.2 * torch.randn((resolution // patch) ** 2, width))
        if spectral_norm:
            group_spectral_norm(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Score images; arguments, results and errors as of :meth:`ResNetDiscriminator.forward`."""
        check_images(images, self.image_channels, self.resolution)
        if self.n_classes:
            check_label_shape(labels, images.shape[0], self.n_classes)
        h = self.to_tokens(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1), labels)
