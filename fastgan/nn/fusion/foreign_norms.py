"""Spectral norms of other code, computed by fastgan's op and in groups while their modules, names and state stay.

Three kinds are known, by structure: torch's older forward pre-hook; layers with a method that returns the normalized
weight and one stored vector (BigGAN's ``W_`` with ``u0`` and ``sv0``, torch-mimicry's ``sn_weights`` with ``sn_u`` and
``sn_sigma``); and modules that wrap a layer and hold its weight as ``weight_bar`` or ``w_bar``. All renew v before u.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan.nn.normed_weight import NormedWeight, OlderHook, Reading, Settings, dtype_of, is_replica, without_supply

_REPLICATE = "_replicate_for_data_parallel"


class OlderNorm(NormedWeight, OlderHook):
    """The forward pre-hook of :func:`torch.nn.utils.spectral_norm`."""

    def __init__(self, replaced: Any, impl: str) -> None:
        super().__init__(replaced.name, replaced.n_power_iterations, replaced.dim, replaced.eps)
        self.replaced, self.impl, self.once = replaced, impl, True

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        norm = OlderNorm(self.replaced, self.impl) if is_replica(module) else self
        setattr(module, self.name, norm._normalized(norm._reading(module)))

    def reading(self, module: nn.Module) -> Reading | None:
        return self._reading(module) if self in module._forward_pre_hooks.values() else None

    def _reading(self, module: nn.Module) -> Reading:
        weight, u, v = (getattr(module, self.name + suffix) for suffix in ("_orig", "_u", "_v"))
        iterations = self.n_power_iterations if module.training else 0
        settings = Settings(iterations, self.eps, True, module.training, self.impl)
        return Reading(weight, u, v, self.dim, settings, dtype_of(weight, module))

    def __getstate__(self) -> dict[str, Any]:
        return without_supply(self.__dict__)


class Spelling(NamedTuple):
    """Names of a layer that keeps u and sigma as buffers and has a method for its normalized weight."""

    method: str
    u: str
    sigma: str
    iterations: str
    iterations_in_eval: bool  # False: there they all begin at the same u, so that they are one


SPELLINGS = (
    Spelling("W_", "u0", "sv0", "num_itrs", False),
    Spelling("sn_weights", "sn_u", "sn_sigma", "num_iters", True),
)


class StoredVectorNorm(NormedWeight):
    """The method that returns the normalized weight of a BigGAN-style layer. v is made anew at each iteration."""

    def __init__(self, module: nn.Module, spelling: Spelling, impl: str) -> None:
        self.module, self.spelling, self.impl, self.once = module, spelling, impl, True
        self._v: Tensor | None = None

    @classmethod
    def put_on(cls, module: nn.Module, spelling: Spelling, impl: str) -> StoredVectorNorm:
        """Let ``module``'s method be a norm of its own, in copies by ``nn.DataParallel`` too."""
        norm = cls(module, spelling, impl)
        module.__dict__.update({spelling.method: norm, _REPLICATE: norm.replicate})
        return norm

    def replicate(self) -> nn.Module:
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)
        self.put_on(replica, self.spelling, self.impl)
        return replica

    def __call__(self) -> Tensor:
        return self._normalized(self._reading())

    def reading(self, module: nn.Module) -> Reading | None:
        return self._reading() if module.__dict__.get(self.spelling.method) is self else None

    def _reading(self) -> Reading:
        module, names = self.module, self.spelling
        weight: Tensor = module.weight  # type: ignore[assignment]
        iterations = getattr(module, names.iterations) if module.training or names.iterations_in_eval else 1
        settings = Settings(iterations, getattr(module, "eps"), True, module.training, self.impl)  # noqa: B009
        u, sigma = getattr(module, names.u).view(-1), getattr(module, names.sigma)
        return Reading(weight, u, self._scratch(weight), 0, settings, dtype_of(weight, module), sigma)

    def _scratch(self, weight: Tensor) -> Tensor:
        """Kept, as tables of device pointers are reused while addresses stay."""
        columns = weight.numel() // weight.shape[0]
        if self._v is None or (self._v.device, self._v.dtype) != (weight.device, weight.dtype):
            with torch.inference_mode(False):  # a later update in training writes to it
                self._v = torch.zeros(columns, dtype=weight.dtype, device=weight.device)
        return self._v

    def __getstate__(self) -> dict[str, Any]:
        return without_supply(self.__dict__) | {"_v": None}


class WrapperNorm(NormedWeight):
    """The forward of a module that wraps a layer; it makes its update in eval mode too, as theirs do.

    Theirs exchange the storage of u and v, so that a backward pass through two forwards takes the vectors of the second
    for both. Here each has its own.
    """

    def __init__(self, wrapper: nn.Module, names: tuple[nn.Module, str, str, str], impl: str) -> None:
        self.wrapper, self.impl, self.once = wrapper, impl, True
        owner, self.weight_name, self.u_name, self.v_name = names
        self.is_owner = owner is wrapper

    @classmethod
    def put_on(cls, wrapper: nn.Module, names: tuple[nn.Module, str, str, str], impl: str) -> WrapperNorm:
        """Let ``wrapper``'s forward be a norm of its own, in copies by ``nn.DataParallel`` too."""
        norm = cls(wrapper, names, impl)
        wrapper.__dict__.update({"forward": norm, _REPLICATE: norm.replicate})
        return norm

    def replicate(self) -> nn.Module:
        replica: Any = type(self.wrapper)._replicate_for_data_parallel(self.wrapper)
        owner = replica if self.is_owner else replica.module
        self.put_on(replica, (owner, self.weight_name, self.u_name, self.v_name), self.impl)
        return replica

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wrapper: Any = self.wrapper
        setattr(wrapper.module, wrapper.name, self._normalized(self._reading()))
        return wrapper.module.forward(*args, **kwargs)

    def reading(self, module: nn.Module) -> Reading | None:
        return self._reading() if module.__dict__.get("forward") is self else None

    def _reading(self) -> Reading:
        wrapper: Any = self.wrapper
        owner = wrapper if self.is_owner else wrapper.module
        weight, u, v = (getattr(owner, name) for name in (self.weight_name, self.u_name, self.v_name))
        settings = Settings(wrapper.power_iterations, 1e-12, True, True, self.impl)
        return Reading(weight, u, v, 0, settings, dtype_of(weight, wrapper.module))

    def __getstate__(self) -> dict[str, Any]:
        return without_supply(self.__dict__)


def stored_spelling(module: nn.Module) -> Spelling | None:
    """Return the names of the parts of a norm that stores u, if ``module`` has one."""
    for names in SPELLINGS:
        has_state = {names.u, names.sigma} <= set(module._buffers) and "weight" in module._parameters
        settings = isinstance(getattr(module, names.iterations, None), int) and hasattr(module, "eps")
        if has_state and settings and callable(getattr(type(module), names.method, None)):
            return names
    return None


def wrapped(module: nn.Module) -> tuple[nn.Module, str, str, str] | None:
    """The owner and names of weight, u and v, if ``module`` wraps a layer to normalize it."""
    inner, name = module._modules.get("module"), getattr(module, "name", None)
    if inner is None or not isinstance(name, str) or not isinstance(getattr(module, "power_iterations", None), int):
        return None
    for owner, names in ((inner, (f"{name}_bar", f"{name}_u", f"{name}_v")), (module, ("w_bar", "u", "v"))):
        if set(names) <= set(owner._parameters):
            return owner, *names
    return None


def vectors_stored(module: Any, spelling: Spelling) -> int:
    """Return how many singular vectors ``module`` keeps; those after the first are there to be looked at."""
    stem = spelling.u.rstrip("0")
    further = [name for name in module._buffers if re.fullmatch(rf"{stem}_?[1-9]\d*", name)]
    return max(1 + len(further), *(getattr(module, name, 1) for name in ("num_svs", "n_svs")))


def unknown_norm(module: nn.Module) -> str:
    """Describe the part of ``module`` that looks like a spectral norm of no known kind, or return ""."""
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", None)
        raw = [f"{name}{suffix}" for suffix in ("_orig", "_bar") if f"{name}{suffix}" in module._parameters]
        if isinstance(name, str) and raw and f"{name}_mask" not in module._buffers:
            return f"a hook of the class {type(hook).__name__} sets {name} from {raw[0]}, and is not torch's"
    cls = type(module)
    if isinstance(inspect.getattr_static(cls, "W_", None), property):
        return f"W_ of {cls.__name__} is a property; it is known as a method"
    is_layer = "weight" in module._parameters or "module" in module._modules
    if is_layer and re.search(r"^SN[A-Z_]|[Ss]pectral", cls.__name__) and "forward" not in module.__dict__:
        return f"{cls.__name__} is not a known kind of spectral norm"
    return ""
