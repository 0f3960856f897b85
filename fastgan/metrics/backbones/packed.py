"""Convolutions on a CPU: with bias and ReLU in one call of oneDNN, on weights that are packed once.

It is what ``torch.compile`` makes of them with frozen weights, without the half minute that it takes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedConvolution:
    """relu(conv(x)), to rounding; the weights are packed at the first call and must not change after it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = conv
        self._options = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
        self._weight: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles, which have no form for packed weights, pack their own."""
        return {**self.__dict__, "_weight": None}

    def __call__(self, x: Tensor) -> Tensor:
        if self._weight is None:
            weight = self._conv.weight.detach()
            self._weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._options, [*x.shape])
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._conv.bias, *self._options, "relu", [None], ""
        )


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has the calls, which are no public ones, and they compute what they should."""
    conv = nn.utils.skip_init(nn.Conv2d, 3, 4, 3, stride=2, padding=1, dtype=dtype)
    with torch.inference_mode():
        for values in (x := torch.empty(1, 3, 7, 5, dtype=dtype), conv.weight, conv.bias):
            values.copy_(torch.linspace(-1, 1, values.numel()).view_as(values))
        x = x.contiguous(memory_format=torch.channels_last)
        try:
            return torch.allclose(PackedConvolution(conv)(x), F.relu(conv(x)), rtol=1e-2, atol=1e-2)
        except (AttributeError, RuntimeError, TypeError):
            return False
