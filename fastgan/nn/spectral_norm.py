"""Spectral normalisation of one layer, and of all layers of a network in one grouped update."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan.backend import check_impl
from fastgan.checks import check_tensor
from fastgan.ops.spectral_norm import output_dtype, spectral_norm_scale, spectral_norm_update

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMALIZED = (*_AUTOCAST, nn.Embedding)

UPDATES = ("forward", "step")


class SpectralNorm(_SpectralNorm):
    """The parametrization W / sigma that :func:`spectral_norm` registers: torch's, with fastgan's op and state."""

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        autocast: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(weight, n_power_iterations, dim, eps)
        if weight.ndim > 1:
            _revive(self._u)
            _revive(self._v)
        self._configure(autocast, impl)

    def _configure(self, autocast: bool, impl: str) -> None:
        self.autocast = autocast
        self.impl = impl
        self._supplied: Tensor | None = None  # this layer's part of a grouped result, during the forward it is for

    @classmethod
    def adopt(cls, norm: _SpectralNorm, *, autocast: bool, impl: str) -> SpectralNorm:
        """A module of this class with the buffers, settings and hooks of torch's ``norm``."""
        adopted = cls.__new__(cls)
        adopted.__dict__.update(norm.__dict__)
        adopted._configure(autocast, impl)
        return adopted

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return super().forward(weight)
        if self._supplied is not None:
            return self._supplied
        iterations = self.n_power_iterations if self.training else 0
        dims = [self.dim]
        vectors = spectral_norm_update([weight], [self._u], [self._v], dims, iterations, self.eps, self.impl)
        return spectral_norm_scale([weight], *vectors, dims, self.output_dtype(weight), self.impl)[0]

    def output_dtype(self, weight: Tensor) -> torch.dtype:
        """Of the normalised weight: autocast's where it is active and the layer follows it, else the weight's."""
        return output_dtype(weight) if self.autocast else weight.dtype

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_supplied": None}


def _revive(vector: Tensor) -> None:
    """A weight of zeros leaves the power method at zero for good; begin at a random direction instead."""
    if not vector.any():
        vector.copy_(nn.functional.normalize(torch.randn_like(vector), dim=0))


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    impl: str = "auto",
) -> nn.Module:
    """Spectral normalisation of ``module``'s parameter ``name``; a drop-in for torch's parametrization of that name.

    Numbers, random state and state-dict keys are those of :func:`torch.nn.utils.parametrizations.spectral_norm`; state
    dicts of the older :func:`torch.nn.utils.spectral_norm` load too. It differs in three points: the iteration is
    float32 (float64 for float64 weights) whatever autocast says, a weight of zeros stays zero where torch gives NaN,
    and the module can be pickled.

    Args:
        module: owner of the parameter.
        name: of a parameter of any rank; of rank 1, it is divided by its Euclidean norm.
        n_power_iterations: power iterations at each access of the weight in training mode.
        eps: lower bound of the norms that are divided by.
        dim: dimension of the outputs; None means 1 for transposed convolutions and 0 for all else.
        impl: "auto", "triton" or "reference".

    Returns:
        ``module``. Under autocast, linear and convolution layers get their weight in the autocast dtype.

    Raises:
        ValueError: there is no such parameter, it has a spectral norm already, or an argument is out of range.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", arXiv 1802.05957.
    """
    weight = module._parameters.get(name, module._buffers.get(name))
    if parametrize.is_parametrized(module, name):
        weight = _parametrizations(module)[name].original
        if any(isinstance(norm, _SpectralNorm) for norm in _parametrizations(module)[name]):
            raise ValueError(f"name={name!r}: this parameter of {type(module).__name__} has a spectral norm already")
    if weight is None:
        raise ValueError(f"name must be that of a parameter or buffer of {type(module).__name__}, got {name!r}")
    check_tensor(name, weight)
    dim = (1 if isinstance(module, _TRANSPOSED) else 0) if dim is None else dim
    _check_settings(n_power_iterations, eps, impl)
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"dim must lie in [{-weight.ndim}, {weight.ndim - 1}] for this {name}, got {dim}")
    with torch.autocast(weight.device.type, enabled=False):  # registration demands that the dtype stays
        norm = SpectralNorm(weight, n_power_iterations, dim, eps, autocast=isinstance(module, _AUTOCAST), impl=impl)
        parametrize.register_parametrization(module, name, norm)
    _complete(module)
    return module


def _check_settings(n_power_iterations: int, eps: float, impl: str) -> None:
    check_impl(impl)
    if n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be 1 or more, got {n_power_iterations}")
    if not eps > 0:
        raise ValueError(f"eps must be greater than 0, got {eps}")


class _Entry(NamedTuple):
    """One layer at one forward."""

    norm: SpectralNorm
    weight: Tensor


class _Cached(NamedTuple):
    """Vectors of some layers, and the state of the tensors that they were computed from."""

    versions: tuple[tuple[int, int, int], ...]
    sample: Tensor
    vectors: tuple[Tensor, Tensor, Tensor]
    outputs: dict[Any, list[Tensor]]


class SpectralNormGroup:
    """Supplies every spectral-normed layer below a root with its weight, from one grouped computation a forward."""

    def __init__(self) -> None:
        self.layers: list[tuple[nn.Module, str]] = []
        self.updates = "forward"
        self._supplied: list[list[_Entry]] = []
        self._cache: dict[Any, _Cached] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_supplied": [], "_cache": {}}

    def before_forward(self, _root: nn.Module, _args: Any) -> None:
        entries = list(self._entries())
        supplied = self._normalized(entries) if entries else []
        for entry, weight in zip(entries, supplied, strict=True):
            entry.norm._supplied = weight
        self._supplied.append(entries)

    def after_forward(self, _root: nn.Module, _args: Any, _output: Any) -> None:
        for entry in self._supplied.pop() if self._supplied else ():
            entry.norm._supplied = None

    def _entries(self) -> Iterator[_Entry]:
        """The layers that are still normed and that no group around this one has supplied."""
        for module, name in self.layers:
            norm = _only_norm(module, name)
            if isinstance(norm, SpectralNorm) and norm._supplied is None:
                yield _Entry(norm, _parametrizations(module)[name].original)

    def _normalized(self, entries: list[_Entry]) -> list[Tensor]:
        parts: dict[Any, list[int]] = {}
        for i, (norm, weight) in enumerate(entries):
            iterations = norm.n_power_iterations if norm.training else 0
            key = (weight.device, weight.dtype, iterations, norm.eps, norm.impl)
            parts.setdefault(key, []).append(i)
        results: dict[int, Tensor] = {}
        for key, indices in parts.items():
            results.update(zip(indices, self._part(key, [entries[i] for i in indices]), strict=True))
        return [results[i] for i in range(len(entries))]

    def _part(self, key: Any, entries: list[_Entry]) -> list[Tensor]:
        """Normalised weights of layers that agree in device, dtype and settings."""
        _device, _dtype, iterations, eps, impl = key
        weights = [entry.weight for entry in entries]
        us, vs = [entry.norm._u for entry in entries], [entry.norm._v for entry in entries]
        dims = [entry.norm.dim for entry in entries]
        dtypes = [entry.norm.output_dtype(entry.weight) for entry in entries]
        reusable = (iterations == 0 or self.updates == "step") and _can_be_remembered(weights)
        cached = self._cache.get(key) if reusable else None
        if cached is None or not _is_current(cached, [*weights, *us, *vs]):
            vectors = spectral_norm_update(weights, us, vs, dims, iterations, eps, impl)
            if reusable:
                cached = _Cached(_versions([*weights, *us, *vs]), _sample([*weights, *us, *vs]), vectors, {})
                self._cache[key] = cached
        else:
            vectors = cached.vectors
        if not reusable or cached is None or (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
            return _scale(weights, vectors, dims, dtypes, impl)
        output_key = (tuple(dtypes), torch.is_inference_mode_enabled())
        if output_key not in cached.outputs:
            cached.outputs[output_key] = _scale(weights, vectors, dims, dtypes, impl)
        return cached.outputs[output_key]


def _scale(
    weights: list[Tensor],
    vectors: tuple[Tensor, Tensor, Tensor],
    dims: list[int],
    dtypes: list[torch.dtype],
    impl: str,
) -> list[Tensor]:
    """W / sigma of every weight in its dtype: one op where all have the same, as they do without autocast."""
    u, v, sigma = vectors
    if len(set(dtypes)) == 1:
        return spectral_norm_scale(weights, u, v, sigma, dims, dtypes[0], impl)
    shapes = [(w.shape[d], w.numel() // w.shape[d]) for w, d in zip(weights, dims, strict=True)]
    u_parts, v_parts = u.split([r for r, _ in shapes]), v.split([c for _, c in shapes])
    results: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(dtypes):
        indices = [i for i, d in enumerate(dtypes) if d == dtype]
        scaled = spectral_norm_scale(
            [weights[i] for i in indices],
            torch.cat([u_parts[i] for i in indices]),
            torch.cat([v_parts[i] for i in indices]),
            torch.stack([sigma[i] for i in indices]),
            [dims[i] for i in indices],
            dtype,
            impl,
        )
        results.update(zip(indices, scaled, strict=True))
    return [results[i] for i in range(len(weights))]


def _can_be_remembered(weights: list[Tensor]) -> bool:
    """False while a graph is traced or captured: what is computed there is no value that a later forward may use."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if any(torch._C._functorch.is_functorch_wrapped_tensor(w) for w in weights):
        return False
    return not (weights[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _is_current(cached: _Cached, tensors: list[Tensor]) -> bool:
    return cached.versions == _versions(tensors) and torch.equal(cached.sample, _sample(tensors))


def _versions(tensors: list[Tensor]) -> tuple[tuple[int, int, int], ...]:
    return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


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
        ValueError: an argument is out of range, or there is nothing to normalise below ``root``.
    """
    _check_settings(n_power_iterations, eps, impl)
    if updates not in UPDATES:
        raise ValueError(f"updates must be one of {', '.join(map(repr, UPDATES))}, got {updates!r}")
    layers = [layer for module in root.modules() for layer in _normed(module, n_power_iterations, eps, impl)]
    if not layers:
        raise ValueError("root must contain a linear, convolution or embedding layer with a weight, got none")
    group = _group_of(root)
    if group is None:
        group = SpectralNormGroup()
        root.register_forward_pre_hook(group.before_forward, prepend=True)
        root.register_forward_hook(group.after_forward, always_call=True)
    group.layers, group.updates = layers, updates
    return root


def _group_of(root: nn.Module) -> SpectralNormGroup | None:
    owners = (getattr(hook, "__self__", None) for hook in root._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, SpectralNormGroup)), None)


def _normed(module: nn.Module, n_power_iterations: int, eps: float, impl: str) -> list[tuple[nn.Module, str]]:
    """Put the norm on ``module``'s weight where it has none, adopt torch's, and name the parameters to be grouped."""
    bare = isinstance(module, _NORMALIZED) and isinstance(module._parameters.get("weight"), Tensor)
    if bare and not isinstance(module.weight, nn.parameter.UninitializedParameter):
        spectral_norm(module, "weight", n_power_iterations, eps, impl=impl)
    if not parametrize.is_parametrized(module):
        return []
    names = [name for name in _parametrizations(module) if _only_norm(module, name) is not None]
    for name in names:
        norms = _parametrizations(module)[name]
        if not isinstance(norms[0], SpectralNorm):
            norms[0] = SpectralNorm.adopt(norms[0], autocast=isinstance(module, _AUTOCAST), impl=impl)
            _complete(module)
    return [(module, name) for name in names]


def _parametrizations(module: nn.Module) -> Any:
    """torch's ModuleDict of ParametrizationLists, whose parts its annotations do not tell."""
    return module.parametrizations


def _only_norm(module: nn.Module, name: str) -> _SpectralNorm | None:
    """The spectral norm of a matrix parameter that has no other parametrization."""
    if not parametrize.is_parametrized(module, name):
        return None
    norms = _parametrizations(module)[name]
    norm = norms[0]
    return norm if len(norms) == 1 and isinstance(norm, _SpectralNorm) and hasattr(norm, "_u") else None


def _complete(module: nn.Module) -> None:
    """Give a parametrized module what torch leaves out: copies that share nothing, pickling, older state dicts."""
    cls: Any = type(module)
    if cls.__dict__.get("__reduce_ex__") is not _reduce:
        cls.__reduce_ex__ = _reduce
        if "__deepcopy__" in cls.__dict__:  # torch's; one that the user's class brings is left alone
            cls.__deepcopy__ = _deepcopy
    if not any(
        getattr(hook, "hook", None) is _read_older_format for hook in module._load_state_dict_pre_hooks.values()
    ):
        module.register_load_state_dict_pre_hook(_read_older_format)


def _deepcopy(module: Any, memo: dict[int, Any]) -> nn.Module:
    rebuild, args, state = _reduce(module)
    memo[id(module)] = replica = rebuild(*args)
    replica.__dict__.update(copy.deepcopy(state, memo))
    return replica


def _reduce(module: Any, _protocol: int = 0) -> tuple[Any, tuple[type, list[str]], dict[str, Any]]:
    return _rebuild, (parametrize.type_before_parametrizations(module), list(module.parametrizations)), module.__dict__


def _rebuild(cls: type[nn.Module], names: list[str]) -> nn.Module:
    """A parametrized instance of ``cls``, of a class of its own, whose ``__dict__`` is still to be filled in."""
    module = cls.__new__(cls)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    injected: Any = type(module)
    injected.__reduce_ex__ = _reduce
    if "__deepcopy__" in injected.__dict__:
        injected.__deepcopy__ = _deepcopy
    return module


def _read_older_format(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename ``weight_orig``, ``weight_u``, ``weight_v`` of torch's older spectral norm; make v where there is none."""
    if not parametrize.is_parametrized(module):
        return
    for name in _parametrizations(module):
        norm = _only_norm(module, name)
        if norm is None or f"{prefix}{name}_orig" not in state_dict:
            continue
        new = f"{prefix}parametrizations.{name}."
        weight = state_dict[new + "original"] = state_dict.pop(f"{prefix}{name}_orig")
        state_dict.pop(prefix + name, None)  # the normalised weight, which the oldest versions saved too
        if f"{prefix}{name}_u" not in state_dict:
            continue
        u = state_dict[new + "0._u"] = state_dict.pop(f"{prefix}{name}_u")
        v = state_dict.pop(f"{prefix}{name}_v", None)
        if v is None:
            matrix = weight.detach().movedim(norm.dim, 0).flatten(1)
            v = nn.functional.normalize(torch.mv(matrix.T, u.to(matrix.dtype)), dim=0, eps=norm.eps)
        state_dict[new + "0._v"] = v
