"""Frechet distances of image sets: streaming statistics, feature networks, folders of images."""

from fastgan.metrics.backbones import Backbone, default_backbone, load_backbone
from fastgan.metrics.errors import InputError
from fastgan.metrics.features import folder_stats, image_stats
from fastgan.metrics.frechet import frechet_distance
from fastgan.metrics.images import ImageFolder
from fastgan.metrics.stats import FeatureStats

__all__ = [
    "Backbone",
    "FeatureStats",
    "ImageFolder",
    "InputError",
    "default_backbone",
    "folder_stats",
    "frechet_distance",
    "image_stats",
    "load_backbone",
]
