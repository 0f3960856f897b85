"""Generators and discriminators."""

from fastgan.models.base import Generator, check_labels
from fastgan.models.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.models.resnet import ResNetDiscriminator, ResNetGenerator, SAGANDiscriminator, SAGANGenerator
from fastgan.models.sketch import SketchDiscriminator, SketchGenerator

__all__ = [
    "DCGANDiscriminator",
    "DCGANGenerator",
    "Generator",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "SAGANDiscriminator",
    "SAGANGenerator",
    "SketchDiscriminator",
    "SketchGenerator",
    "check_labels",
]
