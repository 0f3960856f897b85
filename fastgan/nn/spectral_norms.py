"""Spectral normalization of one layer: torch's parametrization, with fastgan's op and state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan._checks import check_tensor
from fastgan._dispatch import no_autocast
from fastgan.backend import check_impl
from fastgan.nn.normed_weight import (
    AUTOCAST,
    TRANSPOSED,
    NormedWeight,
    OlderHook,
    Reading,
    Settings,
    dtype_of,
    is_sharded,
    without_supply,
)
from fastgan.nn.spectral_norm_state import complete, parametrizations


class SpectralNorm(NormedWeight, _SpectralNorm):
    """The parametrization W / sigma that :func:`spectral_norm` registers."""

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
        self.autocast = autocast
        self.impl = impl

    @classmethod
    def adopt(cls, norm: _SpectralNorm, *, autocast: bool, impl: str, once: bool = False) -> SpectralNorm:
        """A module of this class with the buffers, settings and hooks of torch's ``norm``."""
        adopted = cls.__new__(cls)
        adopted.__dict__.update(norm.__dict__, autocast=autocast, impl=impl, once=once)
        return adopted

    def released(self) -> _SpectralNorm:
        """A module of torch's class with the buffers, settings and hooks of this one."""
        released = _SpectralNorm.__new__(_SpectralNorm)
        own = {"autocast", "impl", "once", "grouped", "_supplied"}
        released.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
        return released

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) if weight.ndim == 1 else self._normalized(self._reading(weight))

    def take(self, source: Tensor | None) -> Tensor | None:
        """The weight that a group has supplied for the raw weight ``source``."""
        return self._take(source, self.training)

    def reading(self, module: nn.Module) -> Reading | None:
        lists = module._modules.get("parametrizations")
        for norms in () if lists is None else lists._modules.values():
            if norms is not None and len(norms._modules) == 1 and norms._modules.get("0") is self:
                return self._reading(norms.original)  # type: ignore[arg-type]
        return None

    def _reading(self, weight: Tensor) -> Reading:
        iterations = self.n_power_iterations if self.training else 0
        settings = Settings(iterations, self.eps, False, self.training, self.impl)
        buffers: dict[str, Any] = self._buffers  # attributes of a module take several times as long
        return Reading(
            weight, buffers["_u"], buffers["_v"], self.dim, settings, dtype_of(weight, autocast=self.autocast)
        )

    def __getstate__(self) -> dict[str, Any]:
        return without_supply(self.__dict__)

    def _replicate_for_data_parallel(self) -> SpectralNorm:
        replica: SpectralNorm = super()._replicate_for_data_parallel()
        replica.__dict__["_supplied"] = {}
        return replica


def _revive(vector: Tensor) -> None:
    """A weight of zeros leaves the power method at zero for good; begin at a random direction instead."""
    if not vector.is_meta and not vector.any():
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
    """Spectral normalization of ``module``'s parameter ``name``; a drop-in for torch's parametrization of that name.

    Results, random state and state-dict keys match :func:`torch.nn.utils.parametrizations.spectral_norm`. State dicts
    of the older :func:`torch.nn.utils.spectral_norm` and of BigGAN's layers (``weight``, ``u0``, ``sv0``) load too.
    There are three differences: the iteration is float32 (float64 for float64 weights) even under autocast, a weight
    of zeros stays zero instead of becoming NaN, and the module can be pickled.

    Args:
        module: owner of the parameter.
        name: of a real parameter of any rank; of rank 1, it is divided by its Euclidean norm. Complex parameters are
            for torch's function of that name.
        n_power_iterations: power iterations at each access of the weight in training mode.
        eps: lower bound of the norms that are divided by.
        dim: dimension of the outputs; None means 1 for transposed convolutions and 0 for all else.
        impl: "auto", "triton", "extension" or "reference".

    Returns:
        ``module``. Under autocast, linear and convolution layers get their weight in the autocast dtype.

    Raises:
        ValueError: there is no such parameter, it has a spectral norm already, or an argument is out of range.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", arXiv 1802.05957.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = spectral_norm(nn.Linear(8, 4), n_power_iterations=20)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 1.1)
        True
    """
    weight = module._parameters.get(name, module._buffers.get(name))
    if parametrize.is_parametrized(module, name):
        weight = parametrizations(module)[name].original
        if any(isinstance(norm, _SpectralNorm) for norm in parametrizations(module)[name]):
            raise ValueError(f"name={name!r}: this parameter of {type(module).__name__} has a spectral norm already")
    if any(isinstance(hook, OlderHook) and hook.name == name for hook in module._forward_pre_hooks.values()):
        raise ValueError(
            f"name={name!r}: this parameter of {type(module).__name__} has the norm of torch.nn.utils.spectral_norm; "
            "fastgan.nn.fuse takes that over"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} must be initialized, by a forward of {type(module).__name__}")
    if weight is None:
        raise ValueError(f"name must be that of a parameter or buffer of {type(module).__name__}, got {name!r}")
    check_weight(name, weight)
    if not weight.ndim:
        raise ValueError(f"name must be that of a vector or matrix, {name!r} is a scalar")
    dim = (1 if isinstance(module, TRANSPOSED) else 0) if dim is None else dim
    check_settings(n_power_iterations, eps, impl)
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"dim must lie in [{-weight.ndim}, {weight.ndim - 1}] for this {name}, got {dim}")
    with no_autocast(weight):  # registration demands that the dtype stays
        norm = SpectralNorm(weight, n_power_iterations, dim, eps, autocast=isinstance(module, AUTOCAST), impl=impl)
        parametrize.register_parametrization(module, name, norm)
    complete(module)
    return module


def check_weight(name: str, weight: Tensor) -> None:
    check_tensor(name, weight)
    if is_sharded(weight):
        raise ValueError(f"{name} must be whole, got a DTensor: put norms on before fully_shard or parallelize_module")


def check_settings(n_power_iterations: int, eps: float, impl: str) -> None:
    check_impl(impl)
    if n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be 1 or more, got {n_power_iterations}")
    if not eps > 0:
        raise ValueError(f"eps must be greater than 0, got {eps}")
