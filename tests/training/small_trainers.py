"""GANs of 16x16 images, narrow enough to train in a moment."""

import torch

from fastgan.data import LabeledImages
from fastgan.models import DCGANDiscriminator, DCGANGenerator, SAGANDiscriminator, SAGANGenerator
from fastgan.training import TrainConfig, Trainer


def data(n=24, n_classes=3):
    rng = torch.Generator().manual_seed(5)
    return LabeledImages(torch.rand(n, 1, 16, 16, generator=rng) * 2 - 1, torch.arange(n) % n_classes, n_classes)


def trainer(seed=0, n_classes=3, networks="sagan", **changes):
    """A trainer of a SAGAN, or of a "dcgan", which has fewer layers."""
    torch.manual_seed(seed)
    shared = {"resolution": 16, "image_channels": 1, "width": 8}
    if networks == "dcgan":
        generator = DCGANGenerator(n_classes, dim_z=8, **shared)
        discriminator = DCGANDiscriminator(n_classes, norm="spectral", head="projection", **shared)
    else:
        generator = SAGANGenerator(n_classes, dim_z=8, attention_resolution=8, **shared)
        discriminator = SAGANDiscriminator(n_classes, attention_resolution=8, **shared)
    config = TrainConfig(**({"steps": 4, "batch_size": 5, "seed": seed, "lr_generator": 1e-3} | changes))
    return Trainer(generator, discriminator, data(), config)
