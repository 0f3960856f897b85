"""Generators and discriminators."""

from fastgan.models.base import Generator, check_labels
from fastgan.models.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.models.resnet import ResNetDiscriminator, ResNetGenerator, SAGANDiscriminator, SAGANGenerator
from fastgan.models.sketch import SketchDiscriminator, SketchGenerator
from fastgan.models.vit import TransformerBlock, ViTDiscriminator

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
    "TransformerBlock",
    "ViTDiscriminator",
    "check_labels",
]
