"""Frechet distances of image sets and their relatives: streaming statistics, feature networks, folders of images.

The classes of :mod:`fastgan.metrics.torchmetrics_api` are imported when first used: they need torchmetrics.
"""

from typing import TYPE_CHECKING, Any

from fastgan._checks import InputError
from fastgan.data.archives import open_images
from fastgan.data.image_sources import ImageFolder, ImageSource
from fastgan.metrics._fid_infinity import fid_infinity
from fastgan.metrics._fld import fld
from fastgan.metrics._inception_score import inception_score
from fastgan.metrics.backbones import Backbone, default_backbone, load_backbone
from fastgan.metrics.diversity import auth_pct, cmmd, ct_score, mifid, vendi_score
from fastgan.metrics.features import folder_stats, image_stats
from fastgan.metrics.frechet import FrechetLoss, frechet_distance, frechet_distances, paired_frechet_distances
from fastgan.metrics.kid import kernel_distance, squared_mmd
from fastgan.metrics.prdc import precision_recall
from fastgan.metrics.protocols import PROTOCOLS, Protocol, get_protocol
from fastgan.metrics.stats import FeatureStats

if TYPE_CHECKING:
    from fastgan.metrics.torchmetrics_api import (
        ClassFrechetDistance,
        FrechetInceptionDistance,
        InceptionScore,
        KernelInceptionDistance,
        MemorizationInformedFrechetInceptionDistance,
        PrecisionRecall,
    )

__all__ = [
    "PROTOCOLS",
    "Backbone",
    "ClassFrechetDistance",
    "FeatureStats",
    "FrechetInceptionDistance",
    "FrechetLoss",
    "ImageFolder",
    "ImageSource",
    "InceptionScore",
    "InputError",
    "KernelInceptionDistance",
    "MemorizationInformedFrechetInceptionDistance",
    "PrecisionRecall",
    "Protocol",
    "auth_pct",
    "cmmd",
    "ct_score",
    "default_backbone",
    "fid_infinity",
    "fld",
    "folder_stats",
    "frechet_distance",
    "frechet_distances",
    "get_protocol",
    "image_stats",
    "inception_score",
    "kernel_distance",
    "load_backbone",
    "mifid",
    "open_images",
    "paired_frechet_distances",
    "precision_recall",
    "squared_mmd",
    "vendi_score",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastgan.metrics import torchmetrics_api

    return getattr(torchmetrics_api, name)
