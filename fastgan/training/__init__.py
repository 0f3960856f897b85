"""Training loop and what goes with it."""

from fastgan.recipes.schema import TrainConfig
from fastgan.training.callbacks import Callback, Every, ProgressBar
from fastgan.training.ema import EMA
from fastgan.training.loop import History, NonFiniteLossError, Trainer
from fastgan.training.sampling import class_rows, sample

__all__ = [
    "EMA",
    "Callback",
    "Every",
    "History",
    "NonFiniteLossError",
    "ProgressBar",
    "TrainConfig",
    "Trainer",
    "class_rows",
    "sample",
]
