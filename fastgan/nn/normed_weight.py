"""Norms of weights, whoever wrote the layer: their tensors and settings, and the weights that groups supply."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan.backend import resolve
from fastgan.ops._spectral_norm import output_dtype, scaled, update_vectors

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
Vectors = tuple[Tensor, Tensor, Tensor]
# Stands for the thread in compiled forwards: dynamo traces neither threads nor frames.
TRACED = 0
OlderHook: Any = sys.modules["torch.nn.utils.spectral_norm"].SpectralNorm  # torch's function of that name hides it


class Settings(NamedTuple):
    """Settings that layers must agree in to be computed together."""

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
    dtype: torch.dtype  # of the normalized weight
    sigma: Tensor | None = None  # receives sigma, if the layer keeps it


class Supply(NamedTuple):
    """A normalized weight that a group computed for one forward."""

    weight: Tensor
    source: Tensor  # the raw weight that it was computed from
    version: int | None  # of the raw weight then; None if it keeps none or the forward is compiled
    frame: FrameType | None  # of the call of the group's root; None if the forward is compiled


class NormedWeight:
    """A norm that computes its weight itself, or takes it from a group for the forward that the group is at."""

    # Whether a supplied weight serves one access only, so that each further one makes an update, as torch's does.
    once = False
    grouped = False  # whether a group supplies it; replicas for nn.DataParallel inherit this
    _supplied: dict[int, Supply] | None = None  # by thread

    def reading(self, module: nn.Module) -> Reading | None:
        """The weight of ``module``, which this norm was put on, or None if the norm has been taken off."""
        raise NotImplementedError

    def join_group(self) -> None:
        # Past nn.Module's own way, which takes several times as long; compiled forwards expect that the entry is there.
        self.__dict__.update(grouped=True, _supplied={})

    def leave_group(self) -> None:
        """Normalize the weight at each access from now on."""
        self.__dict__["grouped"] = False

    def supply(self, weight: Tensor, source: Tensor, frame: FrameType | None) -> None:
        """Give this thread ``weight`` for the raw ``source``, until that changes or the call in ``frame`` ends."""
        supplied = self._supplied
        if supplied is None:
            supplied = self.__dict__["_supplied"] = {}
        version = None if frame is None or source.is_inference() else source._version
        supplied[thread_key()] = Supply(weight, source, version, frame)

    def withdraw(self, frame: FrameType | None) -> None:
        """Forget the weight that was supplied for the call in ``frame``."""
        key = TRACED if frame is None else thread_key()
        supply = self._supplied.get(key) if self._supplied else None
        if supply is not None and supply.frame is frame:
            del self._supplied[key]  # type: ignore[union-attr]

    def is_supplied(self, source: Tensor) -> bool:
        """Return whether a running forward has supplied the weight that belongs to ``source``."""
        return self._supply_for(source) is not None

    def _supply_for(self, source: Tensor | None) -> Supply | None:
        supplied = self._supplied
        if not supplied:
            return None
        if torch.compiler.is_dynamo_compiling():  # the part of a forward that is compiled may be any
            traced = supplied.get(TRACED) or next(iter(supplied.values()))
            return traced if traced.source is source else None
        supply = supplied.get(threading.get_ident()) or supplied.get(TRACED)
        if supply is None or supply.source is not source:
            return None
        if supply.version is not None and supply.version != source._version:
            return None
        if supply.frame is not None and not is_running(supply.frame):
            self.withdraw(supply.frame)  # KeyboardInterrupt and its like end a forward without a call of its hooks
            return None
        return supply

    def _take(self, source: Tensor | None, writes: bool) -> Tensor | None:
        supply = self._supply_for(source)
        if supply is None:
            return None
        if self.once and writes:
            self.withdraw(supply.frame)
        return supply.weight

    def _normalized(self, reading: Reading) -> Tensor:
        supplied = self._take(reading.weight, reading.settings.writes)
        if supplied is not None:
            return supplied
        if is_sharded(reading.weight):
            raise RuntimeError(
                "a weight with a spectral norm must be a whole tensor when it is read, it is a DTensor: under "
                "fully_shard read it in the forward of the module that gathers it; tensor parallelism is not supported"
            )
        impl = resolve(reading.settings.impl, reading.weight)
        return scale([reading], update([reading], impl), impl)[0]


def thread_key() -> int:
    return TRACED if torch.compiler.is_dynamo_compiling() else threading.get_ident()


def calling_frame() -> FrameType | None:
    """Return the frame of the module call that runs the hook which calls this; None in a compiled forward."""
    if torch.compiler.is_dynamo_compiling():
        return None
    caller = frame = sys._getframe(2)
    while frame.f_code.co_name != "_call_impl":
        if frame.f_back is None:
            return caller
        frame = frame.f_back
    return frame


def is_running(frame: FrameType) -> bool:
    """Return whether ``frame`` is still executed. If not, this releases its local variables."""
    try:
        frame.clear()
    except RuntimeError:  # "cannot clear an executing frame"
        return True
    return False


def is_replica(module: nn.Module) -> bool:
    """Return whether ``nn.DataParallel`` made ``module`` for one forward, which dynamo does not trace."""
    return not torch.compiler.is_dynamo_compiling() and "_is_replica" in module.__dict__


def is_sharded(weight: Tensor) -> bool:
    """Return whether ``weight`` is a DTensor, of which this process may hold a part only."""
    return type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "device_mesh")


def dtype_of(weight: Tensor, module: nn.Module | None = None, *, autocast: bool = False) -> torch.dtype:
    """Return the normalized weight's dtype: autocast's if it is active and the layer follows it, else the weight's."""
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
    """Return W / sigma of every weight in its dtype: by one op if all dtypes agree, as they do without autocast."""
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
    """Return a norm's ``__dict__`` for copies and pickles, without weights supplied for a forward of the original."""
    return state | {"_supplied": {}}
