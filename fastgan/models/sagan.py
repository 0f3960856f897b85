"""Conditional SAGAN: residual generator and discriminator with self-attention and spectral normalisation.

Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019; the projection head is Miyato & Koyama,
"cGANs with Projection Discriminator", ICLR 2018.
"""

from __future__ import annotations

from fastgan.models.resnet import ResNetDiscriminator, ResNetGenerator


class SAGANGenerator(ResNetGenerator):
    """Images in [-1, 1] from noise and class labels: a conditional :class:`ResNetGenerator` with attention.

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


class SAGANDiscriminator(ResNetDiscriminator):
    """Logits of images given their labels: a :class:`ResNetDiscriminator` with attention and a projection head.

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


def _check_conditional(n_classes: int) -> None:
    if n_classes < 1:
        raise ValueError(f"n_classes must be at least 1, got {n_classes}")
