"""torch.optim optimisers by name."""

from __future__ import annotations

import torch
from torch import nn

from fastgan.recipes.schema import TrainConfig


def make_optimizer(network: nn.Module, lr: float, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` names, over all parameters of ``network``."""
    parameters, decay = network.parameters(), config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=config.betas, weight_decay=decay, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=config.betas, weight_decay=decay, fused=True)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
