"""Training loop and what goes with it."""

from fastgan.recipes.build import build_networks
from fastgan.recipes.schema import TrainConfig
from fastgan.training.callbacks import Callback, Every, ProgressBar
from fastgan.training.ema import EMA
from fastgan.training.gan import Gan, Objective, RecipeGan
from fastgan.training.sampling import class_rows, sample
from fastgan.training.step.train_step import OwnGan, TrainStep
from fastgan.training.trainer import History, NonFiniteLossError, Trainer

__all__ = [
    "EMA",
    "Callback",
    "Every",
    "Gan",
    "History",
    "NonFiniteLossError",
    "Objective",
    "OwnGan",
    "ProgressBar",
    "RecipeGan",
    "TrainConfig",
    "TrainStep",
    "Trainer",
    "build_networks",
    "class_rows",
    "sample",
]
