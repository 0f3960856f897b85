"""Random inputs of a train step, declared first and drawn later.

A step declares its random numbers as named :class:`Draw` objects; :func:`draw` makes all of them from one generator.
So the same step runs on fresh noise, on noise that a test made, on static buffers, or on noise drawn inside a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("normal", "uniform", "integers")


@dataclass(frozen=True)
class Draw:
    """One random tensor: ``kind`` is "normal" (0, 1), "uniform" in [low, high) or int64 "integers" in [low, high).

    ``dim`` is the dimension with one entry per sample of the batch, None for numbers that all samples share. It matters
    in which a batch is split between processes or into micro-batches.

    Example:
        >>> normal(8, 64)
        Draw(kind='normal', shape=(8, 64), low=0, high=1, dim=0)
    """

    kind: str
    shape: tuple[int, ...]
    low: float = 0
    high: float = 1
    dim: int | None = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        if self.dim is not None and self.shape and not 0 <= self.dim < len(self.shape):
            raise ValueError(
                f"dim must be in [0, {len(self.shape)}), or None for numbers all samples share, got {self.dim}"
            )
        if not self.low < self.high:
            raise ValueError(f"low must be less than high, got {self.low} and {self.high}")

    def make(self, rng: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Draw it on ``device`` from ``rng``, a generator of that device, or from the device's default one."""
        if self.kind == "integers":
            return torch.randint(int(self.low), int(self.high), self.shape, generator=rng, device=device)
        if self.kind == "uniform":
            return torch.rand(self.shape, generator=rng, device=device) * (self.high - self.low) + self.low
        return torch.randn(self.shape, generator=rng, device=device)


def normal(*shape: int, dim: int | None = 0) -> Draw:
    """Independent standard normal numbers.

    Example:
        >>> normal(8, 64).shape
        (8, 64)
    """
    return Draw("normal", shape, dim=dim)


def uniform(*shape: int, low: float = 0, high: float = 1, dim: int | None = 0) -> Draw:
    """Uniform numbers in [low, high).

    Example:
        >>> uniform(8, 1, 1, 1, high=2)
        Draw(kind='uniform', shape=(8, 1, 1, 1), low=0, high=2, dim=0)
    """
    return Draw("uniform", shape, low, high, dim)


def integers(*shape: int, low: int = 0, high: int, dim: int | None = 0) -> Draw:
    """Uniform int64 numbers in [low, high).

    Example:
        >>> integers(8, high=10)
        Draw(kind='integers', shape=(8,), low=0, high=10, dim=0)
    """
    return Draw("integers", shape, low, high, dim)


def draw(
    specs: Mapping[str, Draw],
    rng: torch.Generator | None,
    device: torch.device | str,
    *,
    rank: int = 0,
    counts: Sequence[int] = (),
) -> dict[str, Tensor]:
    """All of ``specs``, in their order, from ``rng``; None stands for the device's default generator.

    If processes share a batch, ``counts`` are the numbers of samples of each, and ``specs`` are for those of process
    ``rank``. What has an entry per sample is drawn for the whole batch, and the entries of this process are returned:
    with generators in the same state, all processes together draw what one alone would.

    Raises:
        ValueError: processes share a batch, and a draw has no such dimension.

    Example:
        >>> drawn = draw({"z": normal(8, 64)}, torch.Generator().manual_seed(0), "cpu")
        >>> drawn["z"].shape
        torch.Size([8, 64])
    """
    drawn = {}
    for name, spec in specs.items():
        if len(counts) < 2 or spec.dim is None:
            drawn[name] = spec.make(rng, device)
            continue
        dim, n = spec.dim, counts[rank]
        if not spec.shape or spec.shape[dim] != n:
            raise ValueError(
                f"draws[{name!r}] must have the {n} samples of this process in dimension {dim}, got shape "
                f"{spec.shape}: say with dim= which dimension is the samples', or dim=None if they share these numbers"
            )
        shape = (*spec.shape[:dim], sum(counts), *spec.shape[dim + 1 :])
        drawn[name] = replace(spec, shape=shape).make(rng, device).narrow(dim, sum(counts[:rank]), n)
    return drawn
