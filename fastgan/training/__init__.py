"""Training: captured train steps for your own loop, and the recipes' loop with its runs, scores and samples."""

import warnings
from typing import Any

from fastgan.recipes.build import build_networks
from fastgan.recipes.schema import TrainConfig
from fastgan.training.ema import EMA
from fastgan.training.gan import GAN, FunctionalGAN, Objective, RecipeGAN
from fastgan.training.sampling import class_rows, sample, standing_statistics_
from fastgan.training.step.eager import LazyTerm
from fastgan.training.step.train_step import NetworkUpdate, TrainStep
from fastgan.training.trainer import Callback, Every, History, NonFiniteLossError, ProgressBar, Trainer

__all__ = [
    "EMA",
    "GAN",
    "Callback",
    "Every",
    "FunctionalGAN",
    "History",
    "LazyTerm",
    "NetworkUpdate",
    "NonFiniteLossError",
    "Objective",
    "ProgressBar",
    "RecipeGAN",
    "TrainConfig",
    "TrainStep",
    "Trainer",
    "build_networks",
    "class_rows",
    "sample",
    "standing_statistics_",
]

_RENAMED = {"Gan": "GAN", "OwnGan": "FunctionalGAN", "RecipeGan": "RecipeGAN"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"fastgan.training.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
