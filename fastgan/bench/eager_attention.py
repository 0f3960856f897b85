"""The canonical attention block as it is usually written: the baseline of fastgan's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.nn import SelfAttention2d


class EagerAttention(nn.Module):
    """The block with its maps in memory, on the layers of ``block``, which pools and has an output convolution."""

    def __init__(self, block: SelfAttention2d) -> None:
        super().__init__()
        if block.o is None:
            raise ValueError("block must have an output convolution")
        self.theta, self.phi, self.g, self.o, self.gamma = block.theta, block.phi, block.g, block.o, block.gamma

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(x).flatten(2)
        phi, g = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (self.phi, self.g))
        beta = torch.softmax(torch.bmm(theta.transpose(1, 2), phi), dim=-1)
        return x + self.gamma * self.o(torch.bmm(g, beta.transpose(1, 2)).unflatten(2, x.shape[2:]))
