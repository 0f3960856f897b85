"""Spectral normalization of all layers of a network in one grouped update."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan._dispatch import is_differentiated, is_exporting
from fastgan.backend import resolve
from fastgan.nn.normed_weight import (
    AUTOCAST,
    TRACED,
    NormedWeight,
    OlderHook,
    Reading,
    Vectors,
    calling_frame,
    is_replica,
    is_running,
    is_sharded,
    scale,
    thread_key,
    update,
)
from fastgan.nn.spectral_norm_state import STORED, complete, only_norm, parametrizations
from fastgan.nn.spectral_norms import SpectralNorm, check_settings, check_weight, spectral_norm

_NORMALIZED = (*AUTOCAST, nn.Embedding)

UPDATES = ("forward", "step")


class _Cached(NamedTuple):
    """Vectors of some layers, and the state of the tensors that they were computed from."""

    owners: list[weakref.ref[Tensor]]
    versions: list[tuple[int, int]]
    sample: Tensor
    vectors: Vectors
    outputs: dict[Any, list[Tensor]]


class SpectralNormGroup:
    """Supplies every spectral-normed layer below a root with its weight, from one grouped computation a forward."""

    def __init__(self) -> None:
        self.layers: list[tuple[nn.Module, NormedWeight]] = []
        self.updates = "forward"
        # Forwards of the root that have begun, by thread: the frame of each call, and the norms supplied for it.
        self._forwards: dict[int, list[tuple[FrameType | None, list[NormedWeight]]]] = {}
        self._cache: dict[Any, _Cached] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forwards": {}, "_cache": {}}

    def take_in(self, layers: Iterable[tuple[nn.Module, NormedWeight]]) -> None:
        """Supply these layers too."""
        for module, norm in layers:
            norm.join_group()
            self.layers.append((module, norm))

    def put_on(self, root: nn.Module) -> None:
        root.register_forward_pre_hook(self.before_forward, prepend=True)
        root.register_forward_hook(self.after_forward, always_call=True)

    def take_off(self, root: nn.Module) -> None:
        for hooks in (root._forward_pre_hooks, root._forward_hooks, root._forward_hooks_always_called):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", hook) is self]:
                del hooks[key]

    def before_forward(self, root: nn.Module, _args: Any) -> None:
        frame = calling_frame()
        self._end_forwards(None)
        for_replica = is_replica(root)
        self._leave_out_sharded(root)
        entries = list(self._entries(_layers_of_replica(root) if for_replica else self.layers))
        weights = self._normalized([reading for _, reading in entries], for_replica) if entries else []
        for (norm, reading), weight in zip(entries, weights, strict=True):
            norm.supply(weight, reading.weight, frame)
        self._forwards.setdefault(thread_key(), []).append((frame, [norm for norm, _ in entries]))

    def after_forward(self, _root: nn.Module, _args: Any, _output: Any) -> None:
        self._end_forwards(calling_frame())

    def _end_forwards(self, ended: FrameType | None) -> None:
        """Withdraw the weights supplied for the call in the frame ``ended``, and for calls that ended without a hook.

        The latter were ended by KeyboardInterrupt or another exception that is no ``Exception``. A compiled forward has
        no frame; no other forward is supposed to be running then.
        """
        for key in {thread_key(), TRACED}:
            running: list[tuple[FrameType | None, list[NormedWeight]]] = []
            for frame, norms in self._forwards.get(key, ()):
                if frame is not None and frame is not ended and is_running(frame):
                    running.append((frame, norms))
                    continue
                for norm in norms:
                    norm.withdraw(frame)
            if running:
                self._forwards[key] = running
            else:
                self._forwards.pop(key, None)

    def _leave_out_sharded(self, root: nn.Module) -> None:
        """Leave layers to themselves that ``fully_shard`` manages below ``root``, whether or not they are whole now.

        They are whole in their own forward and backward; those of the group's op come at other times.
        """
        fsdp = None if torch.compiler.is_dynamo_compiling() else sys.modules.get("torch.distributed.fsdp")
        if fsdp is None or not fsdp.FSDPModule.__subclasses__():  # nothing was ever sharded
            return
        units = [m for m in root.modules() if m is not root and isinstance(m, fsdp.FSDPModule)]
        sharded = {id(m) for unit in units for m in unit.modules()}
        for module, norm in self.layers:
            if id(module) in sharded and norm.grouped:
                reading = norm.reading(module)
                if reading is not None:
                    _check_vectors_are_whole(reading)
                norm.leave_group()

    def _entries(self, layers: Iterable[tuple[nn.Module, NormedWeight]]) -> Iterator[tuple[NormedWeight, Reading]]:
        """The layers that are still normed, whose weight is whole, and that no group around this one has supplied."""
        for module, norm in layers:
            reading = norm.reading(module) if norm.grouped else None
            if reading is None or norm.is_supplied(reading.weight):
                continue
            if _is_whole(reading):
                yield norm, reading
            else:
                norm.leave_group()

    def _normalized(self, readings: list[Reading], for_replica: bool) -> list[Tensor]:
        parts: dict[Any, list[int]] = {}
        for i, reading in enumerate(readings):
            key = (reading.weight.device, reading.weight.dtype, reading.settings)
            parts.setdefault(key, []).append(i)
        results: dict[int, Tensor] = {}
        for key, indices in parts.items():
            part = self._part(key, [readings[i] for i in indices], for_replica)
            results.update(zip(indices, part, strict=True))
        return [results[i] for i in range(len(readings))]

    def _part(self, key: Any, readings: list[Reading], for_replica: bool) -> list[Tensor]:
        """Normalized weights of layers that agree in device, dtype and settings."""
        weights = [r.weight for r in readings]
        impl = resolve(readings[0].settings.impl, weights[0])
        sources = [*weights, *(r.u for r in readings), *(r.v for r in readings)]
        kept = (not readings[0].settings.writes or self.updates == "step") and not for_replica
        if not kept or not _can_be_remembered(sources):
            return scale(readings, update(readings, impl), impl)
        cached = self._cache.get(key)
        if cached is None or not _is_current(cached, sources):
            with torch.inference_mode(False):  # a later forward may save the kept tensors for its backward
                vectors = update(readings, impl)
                owners = [weakref.ref(_owner(t)) for t in sources]
                cached = self._cache[key] = _Cached(owners, _versions(sources), _sample(sources), vectors, {})
        if is_differentiated(*weights):
            return scale(readings, cached.vectors, impl)
        dtypes = tuple(r.dtype for r in readings)
        if dtypes not in cached.outputs:
            with torch.inference_mode(False), torch.no_grad():
                cached.outputs[dtypes] = scale(readings, cached.vectors, impl)
        return cached.outputs[dtypes]


def _layers_of_replica(root: nn.Module) -> Iterator[tuple[nn.Module, NormedWeight]]:
    """The grouped layers of a replica for :class:`torch.nn.DataParallel`, which holds tensors of its own device.

    Those whose supplied weight serves one access only are left out: alone they make the same updates.
    """
    for module in root.modules():
        lists = module._modules.get("parametrizations")
        for norms in () if lists is None else lists.children():
            for norm in norms.children():
                if isinstance(norm, NormedWeight) and norm.grouped and not norm.once:
                    yield module, norm


def _is_whole(reading: Reading) -> bool:
    """False if this process holds a part of the weight outside the layer's forward, as when it is sharded."""
    _check_vectors_are_whole(reading)
    weight, rows, columns = reading.weight, reading.u.shape[0], reading.v.shape[0]
    if is_sharded(weight):
        return False
    if is_exporting():  # a trace takes sizes for tensors
        return True
    return weight.ndim > 1 and weight.shape[reading.dim] == rows and weight.numel() == rows * columns


def _check_vectors_are_whole(reading: Reading) -> None:
    if is_sharded(reading.u) or is_sharded(reading.v):
        raise RuntimeError(
            "the vectors of a spectral norm must not be sharded, updates of them would be lost: name those parameters "
            "in ignored_params of fully_shard"
        )


def _can_be_remembered(sources: list[Tensor]) -> bool:
    """Return False while a graph is traced or captured: its tensors are not values that a later forward may use.

    Also False if a source has no version counter that would reveal a change.
    """
    first = sources[0]
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or first.is_meta:
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) or t.is_inference() for t in sources):
        return False
    return not (first.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_current(cached: _Cached, tensors: list[Tensor]) -> bool:
    same = all(owner() is _owner(t) for owner, t in zip(cached.owners, tensors, strict=True))
    return same and cached.versions == _versions(tensors) and torch.equal(cached.sample, _sample(tensors))


def _owner(t: Tensor) -> Tensor:
    """The tensor that lives as long as the memory of ``t``, which may be a view made at each forward."""
    return t if t._base is None else t._base


def _versions(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in tensors]


def _sample(tensors: list[Tensor]) -> Tensor:
    """Some 64 entries of each tensor: changes through ``.data``, as in averaged copies, leave no other trace."""
    with torch.no_grad():
        return torch.cat([_spread(t) for t in tensors])


def _spread(t: Tensor) -> Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    step = max(1, extent // 64)
    return t.as_strided(((extent + step - 1) // step,), (step,))


def group_spectral_norm(
    root: nn.Module,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    updates: str = "forward",
    impl: str = "auto",
) -> nn.Module:
    """Spectral normalization of a whole network with one grouped power iteration at each forward of ``root``.

    Every Linear, Conv1d-3d, ConvTranspose1d-3d and Embedding weight below ``root`` gets a spectral norm if it has none;
    those with fastgan's or torch's parametrization keep their vectors and settings and join the group. During a forward
    of ``root`` the layers read their weights from the grouped result: a layer used twice has one update, not two. A
    layer called outside such a forward normalizes its weight by itself. The state dict is the one torch's own spectral
    norms give. A second call takes in layers added since, and sets ``updates``.

    One warning names the layers of these kinds that are left out: weights that are parametrized otherwise, pruned,
    normalized by their layer or not initialized yet.

    Modules in eval mode make no update. Their normalized weights are computed once and reused until weights or vectors
    change, which is seen by version counters and, for writes through ``.data``, by 64 sampled entries per tensor. With
    gradients to the weights enabled, and in compiled or captured graphs, they are computed at each forward.

    Part of ``root`` that is recomputed in the backward pass (``torch.utils.checkpoint``) makes updates of its own then;
    that needs ``use_reentrant=True``, or ``root`` as a whole as the part.

    Layers that ``fully_shard`` manages below ``root`` normalize their weights in their own forwards, in which they are
    whole; put the norms on before sharding. Replicas of :class:`torch.nn.DataParallel` are grouped each on its device.

    Args:
        root: the network.
        n_power_iterations: for the layers that get their norm here.
        eps: likewise.
        updates: "forward", an update at each forward in training mode as in torch; or "step", one only after the
            weights have changed, so that all forwards between two optimizer steps see the same vectors. A compiled or
            captured graph, or a replica of :class:`torch.nn.DataParallel`, cannot tell steps apart and makes an update
            at each forward.
        impl: "auto", "triton", "extension" or "reference", likewise for the layers that get their norm here or from
            torch.

    Returns:
        ``root``.

    Raises:
        ValueError: an argument is out of range, there is nothing to normalize below ``root``, a weight is complex or of
            another dtype without a norm, or a layer has the norm of :func:`torch.nn.utils.spectral_norm`,
            which :func:`fastgan.nn.fuse` takes over. No layer has been changed then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> critic = group_spectral_norm(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)))
        >>> critic(torch.randn(2, 8)).shape
        torch.Size([2, 1])
        >>> sorted(critic[2].state_dict())
        ['bias', 'parametrizations.weight.0._u', 'parametrizations.weight.0._v', 'parametrizations.weight.original']
    """
    check_settings(n_power_iterations, eps, impl)
    if updates not in UPDATES:
        raise ValueError(f"updates must be one of {', '.join(map(repr, UPDATES))}, got {updates!r}")
    bare, left_out = [], []
    for path, module in root.named_modules():
        if any(isinstance(hook, OlderHook) for hook in module._forward_pre_hooks.values()):
            raise ValueError(
                f"root has the norm of torch.nn.utils.spectral_norm at {path or 'itself'}; "
                "fastgan.nn.fuse takes that over"
            )
        reason = _reason_to_leave_out(module)
        if reason:
            left_out.append(f"{path or 'root itself'} ({type(module).__name__}: {reason})")
        elif isinstance(module, _NORMALIZED) and "weight" in module._parameters:
            check_weight(f"{path}.weight" if path else "weight", module.weight)
            bare.append(module)
    for module in bare:
        spectral_norm(module, "weight", n_power_iterations, eps, impl=impl)
    layers = [(module, norm) for module in root.modules() for norm in _adopted_norms(module, impl)]
    if not layers:
        found = f"only {', '.join(left_out)}" if left_out else "none"
        raise ValueError(f"root must contain a linear, convolution or embedding layer with a weight, got {found}")
    if left_out:
        warnings.warn(
            f"group_spectral_norm leaves out {len(left_out)} of root's layers: {', '.join(left_out)}", stacklevel=2
        )
    group = group_of(root)
    if group is None:
        group = SpectralNormGroup()
        group.put_on(root)
    group.layers, group.updates = [], updates
    group.take_in(layers)
    return root


def group_of(root: nn.Module) -> SpectralNormGroup | None:
    owners = (getattr(hook, "__self__", None) for hook in root._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, SpectralNormGroup)), None)


def _reason_to_leave_out(module: nn.Module) -> str:
    """Return the reason why a layer gets no norm from the group; "" if it does, or if ``module`` is no such layer."""
    if not isinstance(module, _NORMALIZED):
        return ""
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialized before a first forward"
    if weight is not None:
        stored = next((names for names in STORED if set(names) <= module._buffers.keys()), None)
        return f"it normalizes its weight by {stored[0]}, which fastgan.nn.fuse takes over" if stored else ""
    if parametrize.is_parametrized(module, "weight"):
        norm = only_norm(module, "weight")
        if norm is None:
            names = [type(p).__name__.lstrip("_") for p in parametrizations(module)["weight"]]
            return f"its weight is parametrized by {', '.join(names)}"
        return "its weight is complex" if _is_complex(module, "weight") else ""
    if "weight_mask" in module._buffers:
        return "its weight is pruned"
    return "its weight is no parameter"


def _is_complex(module: nn.Module, name: str) -> bool:
    return parametrizations(module)[name].original.is_complex()


def _adopted_norms(module: nn.Module, impl: str) -> list[NormedWeight]:
    """The norms on ``module`` that are fastgan's, or torch's and now replaced."""
    names = list(parametrizations(module)) if parametrize.is_parametrized(module) else []
    names = [name for name in names if only_norm(module, name) is not None and not _is_complex(module, name)]
    return [adopted(module, name, impl) for name in names]


def adopted(module: nn.Module, name: str, impl: str, *, once: bool = False) -> SpectralNorm:
    """fastgan's norm of a parameter that has it, or torch's, which it then replaces."""
    norms = parametrizations(module)[name]
    if not isinstance(norms[0], SpectralNorm):
        norms[0] = SpectralNorm.adopt(norms[0], autocast=isinstance(module, AUTOCAST), impl=impl, once=once)
        complete(module)
    return norms[0]
