"""Random inputs of a train step, said first and drawn later.

A step tells what it needs as named :class:`Draw` objects; :func:`draw` makes all of them from one generator. So the
same step runs on fresh noise, on noise that a test made, on static buffers, or on noise drawn inside a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("normal", "uniform", "integers")


@dataclass(frozen=True)
class Draw:
    """One random tensor: ``kind`` is "normal" (0, 1), "uniform" in [low, high) or int64 "integers" in [low, high)."""

    kind: str
    shape: tuple[int, ...]
    low: float = 0
    high: float = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        if not self.low < self.high:
            raise ValueError(f"low must be less than high, got {self.low} and {self.high}")

    def make(self, rng: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Draw it on ``device`` from ``rng``, a generator of that device, or from the device's default one."""
        if self.kind == "integers":
            return torch.randint(int(self.low), int(self.high), self.shape, generator=rng, device=device)
        if self.kind == "uniform":
            return torch.rand(self.shape, generator=rng, device=device) * (self.high - self.low) + self.low
        return torch.randn(self.shape, generator=rng, device=device)


def normal(*shape: int) -> Draw:
    """Independent standard normal numbers."""
    return Draw("normal", shape)


def uniform(*shape: int, low: float = 0, high: float = 1) -> Draw:
    """Uniform numbers in [low, high)."""
    return Draw("uniform", shape, low, high)


def integers(*shape: int, low: int = 0, high: int) -> Draw:
    """Uniform int64 numbers in [low, high)."""
    return Draw("integers", shape, low, high)


def draw(
    specs: Mapping[str, Draw],
    rng: torch.Generator | None,
    device: torch.device | str,
    *,
    n: int = 0,
    rank: int = 0,
    parts: int = 1,
) -> dict[str, Tensor]:
    """All of ``specs``, in their order, from ``rng``; None stands for the device's default generator.

    Where a batch is shared by ``parts`` processes and ``specs`` are for the ``n`` samples of one, what has a row a
    sample is drawn for the whole batch, and the rows of process ``rank`` are returned: with generators in the same
    state, all processes together draw what one alone would.
    """
    drawn = {}
    for name, spec in specs.items():
        if parts > 1 and spec.shape[:1] == (n,):
            whole = replace(spec, shape=(n * parts, *spec.shape[1:])).make(rng, device)
            drawn[name] = whole[n * rank : n * (rank + 1)]
        else:
            drawn[name] = spec.make(rng, device)
    return drawn
