"""Spectral normalisation of all layers of a network in one grouped update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan._dispatch import is_differentiated
from fastgan.backend import resolve
from fastgan.nn.normed_weight import AUTOCAST, NormedWeight, OlderHook, Reading, Vectors, scale, update
from fastgan.nn.spectral_norm_state import complete, only_norm, parametrizations
from fastgan.nn.spectral_norms import SpectralNorm, check_settings, spectral_norm

_NORMALIZED = (*AUTOCAST, nn.Embedding)

UPDATES = ("forward", "step")


class _Cached(NamedTuple):
    """Vectors of some layers, and the state of the tensors that they were computed from."""

    versions: tuple[tuple[int, int, int], ...]
    sample: Tensor
    vectors: Vectors
    outputs: dict[Any, list[Tensor]]


class SpectralNormGroup:
    """Supplies every spectral-normed layer below a root with its weight, from one grouped computation a forward."""

    def __init__(self) -> None:
        self.layers: list[tuple[nn.Module, NormedWeight]] = []
        self.updates = "forward"
        self._supplied: list[list[NormedWeight]] = []
        self._cache: dict[Any, _Cached] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_supplied": [], "_cache": {}}

    def take_in(self, layers: Iterable[tuple[nn.Module, NormedWeight]]) -> None:
        """Supply these layers too."""
        for module, norm in layers:
            norm.supply(None)  # a compiled forward asks whether there is such an entry
            self.layers.append((module, norm))

    def put_on(self, root: nn.Module) -> None:
        root.register_forward_pre_hook(self.before_forward, prepend=True)
        root.register_forward_hook(self.after_forward, always_call=True)

    def take_off(self, root: nn.Module) -> None:
        for hooks in (root._forward_pre_hooks, root._forward_hooks, root._forward_hooks_always_called):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", hook) is self]:
                del hooks[key]

    def before_forward(self, _root: nn.Module, _args: Any) -> None:
        entries = list(self._entries())
        supplied = self._normalized([reading for _, reading in entries]) if entries else []
        for (norm, _), weight in zip(entries, supplied, strict=True):
            norm.supply(weight)
        self._supplied.append([norm for norm, _ in entries])

    def after_forward(self, _root: nn.Module, _args: Any, _output: Any) -> None:
        for norm in self._supplied.pop() if self._supplied else ():
            norm.supply(None)

    def _entries(self) -> Iterator[tuple[NormedWeight, Reading]]:
        """The layers that are still normed and that no group around this one has supplied."""
        for module, norm in self.layers:
            reading = None if norm.is_supplied else norm.reading(module)
            if reading is not None:
                yield norm, reading

    def _normalized(self, readings: list[Reading]) -> list[Tensor]:
        parts: dict[Any, list[int]] = {}
        for i, reading in enumerate(readings):
            key = (reading.weight.device, reading.weight.dtype, reading.settings)
            parts.setdefault(key, []).append(i)
        results: dict[int, Tensor] = {}
        for key, indices in parts.items():
            results.update(zip(indices, self._part(key, [readings[i] for i in indices]), strict=True))
        return [results[i] for i in range(len(readings))]

    def _part(self, key: Any, readings: list[Reading]) -> list[Tensor]:
        """Normalised weights of layers that agree in device, dtype and settings."""
        weights = [r.weight for r in readings]
        impl = resolve(readings[0].settings.impl, weights[0])
        sources = [*weights, *(r.u for r in readings), *(r.v for r in readings)]
        reusable = (not readings[0].settings.writes or self.updates == "step") and _can_be_remembered(weights)
        cached = self._cache.get(key) if reusable else None
        if cached is None or not _is_current(cached, sources):
            vectors = update(readings, impl)
            if reusable:
                cached = self._cache[key] = _Cached(_versions(sources), _sample(sources), vectors, {})
        else:
            vectors = cached.vectors
        if not reusable or cached is None or is_differentiated(*weights):
            return scale(readings, vectors, impl)
        output_key = (tuple(r.dtype for r in readings), torch.is_inference_mode_enabled())
        if output_key not in cached.outputs:
            cached.outputs[output_key] = scale(readings, vectors, impl)
        return cached.outputs[output_key]


def _can_be_remembered(weights: list[Tensor]) -> bool:
    """False while a graph is traced or captured: what is computed there is no value that a later forward may use."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if any(torch._C._functorch.is_functorch_wrapped_tensor(w) for w in weights):
        return False
    if weights[0].is_meta:
        return False
    return not (weights[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _is_current(cached: _Cached, tensors: list[Tensor]) -> bool:
    return cached.versions == _versions(tensors) and torch.equal(cached.sample, _sample(tensors))


def _versions(tensors: list[Tensor]) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (id(t if t._base is None else t._base), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors
    )


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
    """Spectral normalisation of a whole network with one grouped power iteration at each forward of ``root``.

    Every Linear, Conv1d-3d, ConvTranspose1d-3d and Embedding weight below ``root`` gets a spectral norm if it has none;
    those with fastgan's or torch's parametrization keep their vectors and settings and join the group. During a forward
    of ``root`` the layers read their weights from the grouped result: a layer used twice has one update, not two. A
    layer called outside such a forward normalises its weight by itself. The state dict is the one torch's own spectral
    norms give. A second call takes in layers added since, and sets ``updates``.

    Modules in eval mode make no update. Their normalised weights are computed once and reused until weights or vectors
    change, which is seen by version counters and, for writes through ``.data``, by 64 sampled entries a tensor. With
    gradients to the weights enabled, and in compiled or captured graphs, they are computed at each forward.

    Part of ``root`` that is recomputed in the backward pass (``torch.utils.checkpoint``) makes updates of its own then;
    that needs ``use_reentrant=True``, or ``root`` as a whole as the part.

    Args:
        root: the network.
        n_power_iterations: for the layers that get their norm here.
        eps: likewise.
        updates: "forward", an update at each forward in training mode as in torch; or "step", one only after the
            weights have changed, so that all forwards between two optimiser steps see the same vectors. A compiled or
            captured graph cannot tell steps apart and makes an update at each forward.
        impl: "auto", "triton" or "reference", likewise for the layers that get their norm here or from torch.

    Returns:
        ``root``.

    Raises:
        ValueError: an argument is out of range, there is nothing to normalise below ``root``, or a layer has the norm
            of :func:`torch.nn.utils.spectral_norm`, which :func:`fastgan.nn.fuse` takes over.
    """
    check_settings(n_power_iterations, eps, impl)
    if updates not in UPDATES:
        raise ValueError(f"updates must be one of {', '.join(map(repr, UPDATES))}, got {updates!r}")
    for path, module in root.named_modules():
        if any(isinstance(hook, OlderHook) for hook in module._forward_pre_hooks.values()):
            raise ValueError(
                f"root has the norm of torch.nn.utils.spectral_norm at {path or 'itself'}; "
                "fastgan.nn.fuse takes that over"
            )
    layers = [(module, norm) for module in root.modules() for norm in _norms_of(module, n_power_iterations, eps, impl)]
    if not layers:
        raise ValueError("root must contain a linear, convolution or embedding layer with a weight, got none")
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


def _norms_of(module: nn.Module, n_power_iterations: int, eps: float, impl: str) -> Iterable[NormedWeight]:
    """Put the norm on ``module``'s weight where it has none, adopt torch's, and return the norms to be grouped."""
    bare = isinstance(module, _NORMALIZED) and isinstance(module._parameters.get("weight"), Tensor)
    if bare and not isinstance(module.weight, nn.parameter.UninitializedParameter):
        spectral_norm(module, "weight", n_power_iterations, eps, impl=impl)
    names = list(parametrizations(module)) if parametrize.is_parametrized(module) else []
    return [adopted(module, name, impl) for name in names if only_norm(module, name) is not None]


def adopted(module: nn.Module, name: str, impl: str, *, once: bool = False) -> SpectralNorm:
    """fastgan's norm of a parameter that has it, or torch's, which it then replaces."""
    norms = parametrizations(module)[name]
    if not isinstance(norms[0], SpectralNorm):
        norms[0] = SpectralNorm.adopt(norms[0], autocast=isinstance(module, AUTOCAST), impl=impl, once=once)
        complete(module)
    return norms[0]
