"""Training loop and what goes with it."""

from fastgan.recipes.schema import TrainConfig
from fastgan.training.callbacks import Callback, Every, ProgressBar
from fastgan.training.ema import EMA
from fastgan.training.gan import Gan, Objective, RecipeGan
from fastgan.training.loop import History, NonFiniteLossError, Trainer
from fastgan.training.networks import build_networks
from fastgan.training.sampling import class_rows, sample
from fastgan.training.train_step import OwnGan, TrainStep

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
