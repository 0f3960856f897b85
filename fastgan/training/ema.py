"""Moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.library import custom_op


@custom_op("fastgan::ema_", mutates_args=("averages", "copies", "updates"))
def ema_(
    averages: Sequence[Tensor],
    values: Sequence[Tensor],
    copies: Sequence[Tensor],
    originals: Sequence[Tensor],
    updates: Tensor,
    decay: float,
) -> None:
    """Move ``averages`` towards ``values``, copy the rest and count, as one op of a captured graph."""
    weight = 1 - ((1 + updates) / (10 + updates)).clamp_max(decay)
    differences = list(torch._foreach_sub(list(values), list(averages)))
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(list(averages), differences)
    if copies:
        torch._foreach_copy_(list(copies), list(originals))
    updates += 1


ema_.register_fake(lambda *_: None)


class EMA:
    """Exponential moving average of a module's parameters and of some of its buffers.

    The decay at update t is min(decay, (1 + t) / (10 + t)), small at first, so that a short run forgets its random
    initial weights too. Other buffers, such as spectral normalization's singular vectors, are copied: their average
    would not be meaningful.

    Args:
        model: the network to follow.
        decay: in [0, 1).
        buffers: last parts of the names of floating-point buffers that are averaged, by default batch norm's. All
            others are copied.

    Attributes:
        module: the averaged network, in eval mode.
        updates: number of updates so far, a scalar on the network's device. An update reads nothing on the host, so
            that a graph can hold it.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> average = EMA(net, 0.999)
        >>> average.update(net)  # after each optimizer step
        >>> average.module(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """

    REACHED_TWICE = ("_averaged", "_copied")
    """Attributes of tensors that ``module`` has too: a captured step looks at them there, by their names."""

    def __init__(
        self, model: nn.Module, decay: float, *, buffers: Sequence[str] = ("running_mean", "running_var")
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in buffers and not buffer.is_floating_point():
                raise ValueError(f"buffers must name floating-point buffers, {name} is {buffer.dtype}")
        self.decay, self.buffers = decay, tuple(buffers)
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._averaged, self._copied = self._split(self.module)
        self.updates = torch.zeros((), dtype=torch.float64, device=self._averaged[0].device)

    def tensors(self) -> list[Tensor]:
        """All tensors that an update changes: averages, copies, and the count."""
        return [*self._averaged, *self._copied, self.updates]

    @torch.no_grad()
    def update(self, model: nn.Module, tensors: Sequence[Tensor] | None = None) -> None:
        """Move the average towards ``model``, a network of the same structure.

        While a step is captured, ``tensors`` stand for :meth:`tensors`.
        """
        *own, updates = self.tensors() if tensors is None else tensors
        values, originals = self._split(model)
        n = len(self._averaged)
        ema_(own[:n], values, own[n:], originals, updates, self.decay)

    def _split(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors to average and tensors to copy, each in the module's order."""
        averaged = [p.detach() for p in model.parameters()]
        copied: list[Tensor] = []
        for name, buffer in model.named_buffers():
            (averaged if name.rpartition(".")[2] in self.buffers else copied).append(buffer)
        return averaged, copied
