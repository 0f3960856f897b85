"""Self-attention blocks of other code, recognised by structure and run by fastgan's op under their own names."""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastgan.nn.attention import SelfAttention2d

_FAMILIES = (("theta", "phi", "g", "o"), ("query", "key", "value", "o"), ("f", "g", "h", "o"))
_OUTPUT_NAMES = ("o", "out", "attn", "output", "v", "proj")


class Roles(NamedTuple):
    """The names that a block gives to its parts."""

    theta: str
    phi: str
    g: str
    o: str | None
    gamma: str


class AdoptedAttention2d(SelfAttention2d):
    """:class:`SelfAttention2d` in the place of another module: with its submodules, parameters, hooks and names."""

    replaced: nn.Module
    roles: Roles

    @classmethod
    def adopt(cls, block: nn.Module, roles: Roles, *, pool: bool, scale: float | None, impl: str) -> AdoptedAttention2d:
        """``scale`` None is 1/sqrt(channels of theta)."""
        theta, g = conv_of(block, roles.theta), conv_of(block, roles.g)
        adopted = cls.__new__(cls)
        adopted.__dict__.update(
            block.__dict__,
            replaced=block,  # not a submodule: its tensors are those of this module
            roles=roles,
            in_channels=theta.in_channels,
            qk_channels=theta.out_channels,
            value_channels=g.out_channels,
            pool=pool,
            scale=theta.out_channels**-0.5 if scale is None else scale,
            impl=impl,
        )
        return adopted

    def released(self) -> nn.Module:
        """The module that this one replaced."""
        self.replaced.training = self.training
        return self.replaced

    @property
    def theta(self) -> Any:  # type: ignore[override]
        return self._modules[self.roles.theta]

    @property
    def phi(self) -> Any:  # type: ignore[override]
        return self._modules[self.roles.phi]

    @property
    def g(self) -> Any:  # type: ignore[override]
        return self._modules[self.roles.g]

    @property
    def o(self) -> Any:  # type: ignore[override]
        return None if self.roles.o is None else self._modules[self.roles.o]

    @property
    def gamma(self) -> Any:  # type: ignore[override]
        return self._parameters[self.roles.gamma]

    def forward(self, x: Tensor, *_unused: Any, **_unused_by_name: Any) -> Any:
        return super().forward(x)

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


def roles_of(block: nn.Module) -> Roles | None:
    """The roles of ``block``'s parts if it has those of a self-attention block and no others with parameters."""
    by_name = {_bare(name): name for name, child in block._modules.items() if _has_parameters(child)}
    scalars = [name for name, p in block._parameters.items() if p is not None and p.numel() == 1]
    if len(scalars) != 1 or len([p for p in block._parameters.values() if p is not None]) != 1:
        return None
    for *three, o in _FAMILIES:
        if not set(three) <= set(by_name):
            continue
        rest = set(by_name) - set(three)
        if rest and not (len(rest) == 1 and rest <= {o, *_OUTPUT_NAMES}):
            continue
        theta, phi, g = (by_name[name] for name in three)
        roles = Roles(theta, phi, g, by_name[rest.pop()] if rest else None, scalars[0])
        if _fits(block, roles):
            return roles
    return None


def conv_of(block: nn.Module, name: str) -> nn.Conv2d:
    """A block's convolution, or the one inside a module that normalises it."""
    child: Any = block._modules[name]
    inner = child._modules.get("module")
    return child if inner is None else inner


def unused_arguments(block: nn.Module) -> int:
    """How many arguments ``block`` takes after x."""
    parameters = list(inspect.signature(block.forward).parameters.values())[1:]
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)])


def _bare(name: str) -> str:
    """``snconv1x1_theta``, ``theta_conv``, ``conv_theta`` -> ``theta``."""
    return re.sub(r"(_conv|_proj|_layer)$", "", re.sub(r"^(sn)?(conv(1x1)?_)?", "", name.lower()))


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def _fits(block: nn.Module, roles: Roles) -> bool:
    convs = [conv_of(block, name) for name in roles[:4] if name is not None]
    if not all(isinstance(c, nn.Conv2d) and _is_pointwise(c) for c in convs):
        return False
    theta, phi, g, *out = convs
    same_input = theta.in_channels == phi.in_channels == g.in_channels
    ends = out[0].out_channels == g.in_channels and out[0].in_channels == g.out_channels if out else False
    return same_input and theta.out_channels == phi.out_channels and (ends or g.out_channels == g.in_channels)


def _is_pointwise(c: nn.Conv2d) -> bool:
    return c.kernel_size == (1, 1) and c.stride == (1, 1) and c.padding in ((0, 0), "valid", "same") and c.groups == 1
