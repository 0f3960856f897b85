"""What normalising a weight takes, whoever wrote the layer: its tensors, its settings, and who gets the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan.backend import resolve
from fastgan.ops._spectral_norm import output_dtype, scaled, update_vectors

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
Vectors = tuple[Tensor, Tensor, Tensor]
OlderHook: Any = sys.modules["torch.nn.utils.spectral_norm"].SpectralNorm  # torch's function of that name hides it


class Settings(NamedTuple):
    """What layers must agree in to be computed together."""

    iterations: int
    eps: float
    v_first: bool
    writes: bool  # u and v take the result of the iterations
    impl: str


class Reading(NamedTuple):
    """One weight at one forward."""

    weight: Tensor
    u: Tensor
    v: Tensor
    dim: int
    settings: Settings
    dtype: torch.dtype  # of the normalised weight
    sigma: Tensor | None = None  # takes sigma, where the layer keeps it


class NormedWeight:
    """A norm that computes its weight itself, or takes it from a group for the forward that the group is at."""

    # Whether a supplied weight serves one access only, so that each further one makes an update, as torch's does.
    once: bool = False
    _supplied: Tensor | None = None

    def reading(self, module: nn.Module) -> Reading | None:
        """The weight of ``module``, which this norm was put on, or None if the norm has been taken off."""
        raise NotImplementedError

    def supply(self, weight: Tensor | None) -> None:
        self.__dict__["_supplied"] = weight  # past nn.Module's own way, which takes several times as long

    @property
    def is_supplied(self) -> bool:
        return self._supplied is not None

    def _take(self, writes: bool) -> Tensor | None:
        supplied = self._supplied
        if self.once and writes:
            self._supplied = None
        return supplied

    def _normalized(self, reading: Reading) -> Tensor:
        supplied = self._take(reading.settings.writes)
        if supplied is not None:
            return supplied
        impl = resolve(reading.settings.impl, reading.weight)
        return scale([reading], update([reading], impl), impl)[0]


def dtype_of(weight: Tensor, module: nn.Module | None = None, *, autocast: bool = False) -> torch.dtype:
    """Of the normalised weight: autocast's where it is active and the layer follows it, else the weight's."""
    return output_dtype(weight) if autocast or isinstance(module, AUTOCAST) else weight.dtype


def update(readings: Sequence[Reading], impl: str) -> Vectors:
    """Power iterations on weights that agree in device, dtype and settings; flat u, flat v and every sigma."""
    settings = readings[0].settings
    us, vs = [r.u for r in readings], [r.v for r in readings]
    if settings.iterations and not settings.writes:
        us, vs = [u.clone() for u in us], [v.clone() for v in vs]
    vectors = update_vectors(
        [r.weight for r in readings],
        us,
        vs,
        [r.dim for r in readings],
        settings.iterations,
        settings.eps,
        impl,
        settings.v_first,
    )
    if settings.writes and any(r.sigma is not None for r in readings):
        kept = [(r.sigma, value) for r, value in zip(readings, vectors[2].unbind(), strict=True) if r.sigma is not None]
        targets, values = zip(*kept, strict=True)
        with torch.no_grad():
            torch._foreach_copy_([target.view(()) for target in targets], list(values))
    return vectors


def scale(readings: Sequence[Reading], vectors: Vectors, impl: str) -> list[Tensor]:
    """W / sigma of every weight in its dtype: one op where all have the same, as they do without autocast."""
    u, v, sigma = vectors
    weights, dims = [r.weight for r in readings], [r.dim for r in readings]
    if len({r.dtype for r in readings}) == 1:
        return scaled(weights, u, v, sigma, dims, readings[0].dtype, impl)
    u_parts, v_parts = u.split([len(r.u) for r in readings]), v.split([len(r.v) for r in readings])
    results: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(r.dtype for r in readings):
        indices = [i for i, r in enumerate(readings) if r.dtype == dtype]
        part = scaled(
            [weights[i] for i in indices],
            torch.cat([u_parts[i] for i in indices]),
            torch.cat([v_parts[i] for i in indices]),
            torch.stack([sigma[i] for i in indices]),
            [dims[i] for i in indices],
            dtype,
            impl,
        )
        results.update(zip(indices, part, strict=True))
    return [results[i] for i in range(len(readings))]


def without_supply(state: dict[str, Any]) -> dict[str, Any]:
    """``__dict__`` of a norm as copies and pickles get it: what was supplied belongs to a forward of the original."""
    return state | {"_supplied": None}
