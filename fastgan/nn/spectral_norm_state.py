"""Copies, pickles and checkpoints of modules with a spectral norm."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan.reference.spectral_norm import as_matrix

# Buffers (1, rows) in which other code keeps u, and sigma: BigGAN's, and torch-mimicry's.
STORED = (("u0", "sv0"), ("sn_u", "sn_sigma"))


def parametrizations(module: nn.Module) -> Any:
    """Return torch's ModuleDict of ParametrizationLists, as Any: torch does not annotate its parts."""
    return module.parametrizations


def only_norm(module: nn.Module, name: str) -> _SpectralNorm | None:
    """The spectral norm of a matrix parameter that has no other parametrization."""
    if not parametrize.is_parametrized(module, name):
        return None
    norms = parametrizations(module)[name]
    norm = norms[0]
    return norm if len(norms) == 1 and isinstance(norm, _SpectralNorm) and hasattr(norm, "_u") else None


def complete(module: nn.Module) -> None:
    """Give a parametrized module what torch's lacks: independent copies, pickling and loading of older state dicts."""
    cls: Any = type(module)
    if cls.__dict__.get("__reduce_ex__") is not _reduce:
        cls.__reduce_ex__ = _reduce
        if "__deepcopy__" in cls.__dict__:  # torch's; one that the user's class brings is left alone
            cls.__deepcopy__ = _deepcopy
    for name in parametrizations(module):
        _shorten(cls, name)
    if not any(
        getattr(hook, "hook", None) is _read_other_formats for hook in module._load_state_dict_pre_hooks.values()
    ):
        module.register_load_state_dict_pre_hook(_read_other_formats)


def _shorten(cls: Any, name: str) -> None:
    """Let the attribute ``name`` answer at once with a weight that a group has supplied.

    torch's way to it, through the calls of two modules, takes longer than to launch a kernel.
    """
    own = cls.__dict__.get(name)
    if not isinstance(own, property) or isinstance(own, _Shortcut) or own.fget is None:
        return

    def get(module: Any, slow: Any = own.fget) -> Tensor:
        if not torch.compiler.is_compiling():
            norms = module._modules["parametrizations"]._modules[name]
            if len(norms._modules) == 1 and norms._modules["0"].__dict__.get("_supplied"):
                supplied = norms._modules["0"].take(norms._parameters.get("original"))
                if supplied is not None:
                    return supplied
        return slow(module)

    setattr(cls, name, _Shortcut(get, own.fset, own.fdel, own.__doc__))


class _Shortcut(property):
    """A property that :func:`_shorten` has made."""


def _deepcopy(module: Any, memo: dict[int, Any]) -> nn.Module:
    rebuild, args, state = _reduce(module)
    memo[id(module)] = replica = rebuild(*args)
    replica.__dict__.update(copy.deepcopy(state, memo))
    return replica


def _reduce(module: Any, _protocol: int = 0) -> tuple[Any, tuple[type, list[str]], dict[str, Any]]:
    return _rebuild, (parametrize.type_before_parametrizations(module), list(module.parametrizations)), module.__dict__


def _rebuild(cls: type[nn.Module], names: list[str]) -> nn.Module:
    """A parametrized instance of ``cls`` with its own class, whose ``__dict__`` is still to be filled in."""
    module = cls.__new__(cls)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
        _shorten(type(module), name)
    injected: Any = type(module)
    injected.__reduce_ex__ = _reduce
    if "__deepcopy__" in injected.__dict__:
        injected.__deepcopy__ = _deepcopy
    return module


def _read_other_formats(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the entries of torch's older spectral norm and of BigGAN's; make the vectors that they lack."""
    if not parametrize.is_parametrized(module):
        return
    for name in parametrizations(module):
        norm = only_norm(module, name)
        if norm is not None:
            _read_older_format(norm, name, state_dict, prefix)
            _read_stored_u(norm, name, state_dict, prefix)


def _read_older_format(norm: _SpectralNorm, name: str, state_dict: dict[str, Any], prefix: str) -> None:
    """``weight_orig``, ``weight_u`` and ``weight_v``, which the oldest versions did not save."""
    if f"{prefix}{name}_orig" not in state_dict:
        return
    new = f"{prefix}parametrizations.{name}."
    weight = state_dict[new + "original"] = state_dict.pop(f"{prefix}{name}_orig")
    state_dict.pop(prefix + name, None)  # the normalized weight, which the oldest versions saved too
    if f"{prefix}{name}_u" not in state_dict:
        return
    u = state_dict[new + "0._u"] = state_dict.pop(f"{prefix}{name}_u")
    v = state_dict.pop(f"{prefix}{name}_v", None)
    state_dict[new + "0._v"] = _normalized(as_matrix(weight.detach(), norm.dim).T, u, norm.eps) if v is None else v


def _read_stored_u(norm: _SpectralNorm, name: str, state_dict: dict[str, Any], prefix: str) -> None:
    """``weight`` and ``u0``: an iteration from u, as BigGAN's layers make at each forward, gives the vectors.

    In eval mode the layer then has the weight that BigGAN's had.
    """
    for u_name, sigma_name in STORED if name == "weight" else ():
        if prefix + u_name in state_dict and prefix + name in state_dict:
            new = f"{prefix}parametrizations.{name}."
            weight = state_dict[new + "original"] = state_dict.pop(prefix + name)
            matrix = as_matrix(weight.detach(), norm.dim)
            v = _normalized(matrix.T, state_dict.pop(prefix + u_name).flatten(), norm.eps)
            state_dict[new + "0._u"], state_dict[new + "0._v"] = _normalized(matrix, v, norm.eps), v
            state_dict.pop(prefix + sigma_name, None)


def _normalized(matrix: Tensor, vector: Tensor, eps: float) -> Tensor:
    """matrix @ vector, of length 1."""
    return nn.functional.normalize(torch.mv(matrix, vector.to(matrix.dtype)), dim=0, eps=eps)
