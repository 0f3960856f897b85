"""Random weights for Inception: the published ones are not at hand everywhere."""

import torch
from torch import nn


def randomize(network):
    """Weights at which activations neither die nor grow, and normalizations that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.weight, 0.7, 1.3),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.7, 1.3),
            ):
                nn.init.uniform_(value, low, high, generator=generator)
    return network.eval()
