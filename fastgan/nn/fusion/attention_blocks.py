"""Self-attention blocks of other code: recognized by their parts and computed by fastgan's op.

A fused block stays the same object. Its class becomes a subclass of its own and of :class:`SelfAttention2d`, whose
forward computes the block's function; its attributes, methods, hooks and state-dict keys stay.
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastgan.backend import warn_once
from fastgan.nn.attention import (
    AttentionParts,
    AttentionSettings,
    SelfAttention2d,
    pointwise_layer,
    self_attention,
    self_attention_and_map,
)

FAMILIES = (("theta", "phi", "g"), ("query", "key", "value"), ("q", "k", "v"), ("f", "g", "h"))
# A block gives its features alone, or a pair of them and None or its map: queries x keys or transposed, with the
# second axis flat or as (height, width).
RETURNS = ("features", "none", "map", "transposed", "map 2d", "transposed 2d")
_PLAN = "_attention_plan"
_CLASSES: dict[Any, Any] = {}  # of fused blocks, by their own
_ATOMS = (bool, int, float, str, type(None))
_TORCH_MODULE = set(nn.Module().__dict__)


class Roles(NamedTuple):
    """Paths of a block's parts below the block."""

    theta: str
    phi: str
    g: str
    o: str | None = None
    gamma: str | None = None
    norm: str | None = None

    def exchanged(self) -> Roles:
        """These with theta and phi exchanged: the softmax is over the queries."""
        return self._replace(theta=self.phi, phi=self.theta)


@dataclass(frozen=True)
class Plan:
    """Everything that a fused block needs to know beyond its own attributes."""

    roles: Roles
    settings: AttentionSettings
    returns: str  # one of RETURNS
    uses_arguments: bool = False  # it may use arguments beyond x
    even_only: bool = False  # it raises for maps of odd size
    constants: tuple[tuple[str, Any], ...] = ()  # its attributes when it was fused


class FusedAttention:
    """The methods that a fused block has before those of its own class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make an unfused block, as code that calls ``type(block)(...)`` expects."""
        self.__class__ = original_class(self)  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan: Plan = self._attention_plan  # type: ignore[attr-defined]
        if not _serves(plan, self, args, kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x, parts = args[0], _parts(self, plan.roles)
        if plan.returns == "features":
            return self_attention(x, parts, plan.settings)
        if plan.returns == "none":
            return self_attention(x, parts, plan.settings), None
        y, attention_map = self_attention_and_map(x, parts, plan.settings)
        height, width = x.shape[2:]
        if plan.returns.startswith("transposed"):
            attention_map = attention_map.transpose(1, 2)
        elif plan.settings.pool:
            height, width = height // 2, width // 2
        return y, attention_map.unflatten(2, (height, width)) if plan.returns.endswith("2d") else attention_map

    def extra_repr(self) -> str:
        settings = self._attention_plan.settings  # type: ignore[attr-defined]
        own = original_class(self).extra_repr(self)  # type: ignore[arg-type]
        return ", ".join(filter(None, [own, f"fused, pool={settings.pool}, scale={settings.scale:g}"]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the block's class: that of a fused block is made at run time."""
        reduced: Any = super().__reduce_ex__(protocol)
        rebuild, arguments, *state = reduced
        if arguments and arguments[0] is type(self):
            return _rebuilt, (original_class(self), rebuild, *arguments[1:]), *state
        return rebuild, arguments, *state


def adopt(block: nn.Module, plan: Plan) -> None:
    """Turn ``block`` into a fused block in place."""
    block.__dict__[_PLAN] = replace(plan, constants=tuple(_constants(block)))
    block.__class__ = _fused_class(type(block))


def release(block: nn.Module) -> None:
    """Give a fused block its own class back."""
    del block.__dict__[_PLAN]
    block.__class__ = original_class(block)


def original_class(block: Any) -> type[nn.Module]:
    """Return the class that a fused block had."""
    return type(block).__bases__[1]


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, FusedAttention)


def _fused_class(cls: Any) -> Any:
    if cls in _CLASSES:
        return _CLASSES[cls]
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,  # the name by which code that looks at names knows the block
        "__doc__": cls.__doc__,
    }
    _CLASSES[cls] = types.new_class(
        cls.__name__, (FusedAttention, cls, SelfAttention2d), {}, lambda names: names.update(namespace)
    )
    return _CLASSES[cls]


def _rebuilt(cls: type[nn.Module], rebuild: Any, *arguments: Any) -> nn.Module:
    block = rebuild(cls, *arguments)
    block.__class__ = _fused_class(cls)
    return block


def _constants(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that the block's forward may depend on; of objects that are not compared, their type."""
    for name, value in block.__dict__.items():
        if name not in _TORCH_MODULE and name != _PLAN and not isinstance(value, Tensor | nn.Module):
            yield name, value if isinstance(value, _ATOMS) else type(value)


def _serves(plan: Plan, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the fused block may serve this call: only calls like those compared at fusion are served."""
    if not args or (plan.uses_arguments and any(value is not None for value in (*args[1:], *kwargs.values()))):
        return False
    x, settings = args[0], plan.settings
    if not isinstance(x, Tensor) or x.ndim != 4:
        return False
    if settings.pool and min(x.shape[2:]) < 2:
        return False
    if plan.even_only and (x.shape[2] % 2 or x.shape[3] % 2):
        return False
    for name, expected in plan.constants:
        value = getattr(block, name, None)
        if (value if isinstance(value, _ATOMS) else type(value)) != expected:
            warn_once(f"{type(block).__name__} runs its own forward: its attribute {name} was changed after fuse()")
            return False
    for path in (plan.roles.theta, plan.roles.phi, plan.roles.g, plan.roles.o):
        if path is not None and pointwise_layer(_at(block, path)) is None:
            warn_once(f"{type(block).__name__} runs its own forward: {path} was replaced after fuse()")
            return False
    return True


def _parts(block: Any, roles: Roles) -> AttentionParts:
    parts: Any = (None if path is None else _at(block, path) for path in roles)
    return AttentionParts(*parts)


def _at(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name)
    return block


def candidates(block: nn.Module, names: tuple[Mapping[str, str], ...] = ()) -> tuple[list[Roles], str]:
    """Return the roles that ``block``'s parts may have, likeliest first, and why there are none.

    A family of names is tried as it is and with theta and phi exchanged. Without such names all roles are tried that
    fit the shapes. The reason is empty if nothing about ``block`` looks like attention.
    """
    for given in names:
        if has_parts(block, given):
            roles = Roles(**given)
            return ([roles, roles.exchanged()], "") if _fits(block, roles) else ([], "the parts do not fit together")
    if isinstance(block, nn.Sequential | nn.ModuleList | nn.ModuleDict | nn.MultiheadAttention):
        return [], "it has several heads" if isinstance(block, nn.MultiheadAttention) else ""
    found, reason = _projections(block)
    by_name = {_bare(path): path for path in found}
    named = [[by_name[name] for name in family] for family in FAMILIES if set(family) <= set(by_name)]
    if reason:
        return [], reason if named or _looks_like_attention(block) else ""
    orders = [(*three, *(path for path in found if path not in three)) for three in named]
    fitting = []
    for theta, phi, g, *o in orders or itertools.permutations(found):
        given_roles = Roles(theta, phi, g, o[0] if o else None, _scalar(block), _norm(block))
        if _fits(block, given_roles):
            fitting += [given_roles, given_roles.exchanged()] if named else [given_roles]
    if not fitting and (named or _looks_like_attention(block)):
        return [], "its projections do not fit together"
    return fitting, ""


def is_named_like_attention(block: nn.Module) -> bool:
    """Return whether the names of ``block`` or of its parts say that it is attention."""
    bare = {_bare(name) for name, child in block._modules.items() if pointwise_layer(child) is not None}
    return _looks_like_attention(block) or any(set(family) <= bare for family in FAMILIES)


def _projections(block: nn.Module) -> tuple[list[str], str]:
    """Return paths of the projections if ``block`` has three or four and no other parts but a norm and a scalar."""
    found, others = [], []
    for name, child in block._modules.items():
        if child is None or next(child.parameters(), None) is None:
            continue
        if pointwise_layer(child) is not None:
            found.append(name)
        elif isinstance(child, nn.ModuleList) and len(child) and pointwise_layer(child[0]) is not None:
            found.append(f"{name}.0")  # followed by dropout, in diffusers
        elif not _is_norm(child):
            others.append(name)
    parameters = [name for name, p in block._parameters.items() if p is not None]
    if others or len(found) not in (3, 4):
        return found, (
            f"{type(block).__name__} does not have the parts of a known block: it has {len(found)} 1x1 projections"
            + (f" and {', '.join(others)}" if others else "")
        )
    if len(parameters) > 1 or (parameters and _scalar(block) is None):
        return found, f"{type(block).__name__} has parameters of its own that are not one scalar: {parameters}"
    if sum(_is_norm(child) for child in block._modules.values()) > 1:
        return found, f"{type(block).__name__} has more than one norm"
    return found, ""


def _scalar(block: nn.Module) -> str | None:
    return next((name for name, p in block._parameters.items() if p is not None and p.numel() == 1), None)


def _norm(block: nn.Module) -> str | None:
    return next((name for name, child in block._modules.items() if _is_norm(child)), None)


def _is_norm(module: nn.Module | None) -> bool:
    """Return whether ``module`` has the parameters of a layer that normalizes feature maps."""
    if module is None or module._modules or pointwise_layer(module) is not None:
        return False
    sizes = [p.shape for p in module.parameters(recurse=False)]
    return "norm" in type(module).__name__.lower() and bool(sizes) and all(len(size) in (1, 3, 4) for size in sizes)


def _looks_like_attention(block: nn.Module) -> bool:
    name = re.sub("[^a-z]", "", type(block).__name__.lower())
    return "attention" in name or "attn" in name or "nonlocal" in name


def _bare(path: str) -> str:
    """``snconv1x1_theta``, ``theta_conv``, ``to_q``, ``W_f`` -> ``theta``, ``q``, ``f``."""
    name = path.split(".")[0].lower()
    name = re.sub(r"^(sn)?((conv(1x1)?|to|w|proj|linear|fc)_|w(?=[qkvfgh]$))?", "", name)
    return re.sub(r"(_?(conv|proj|projection|layer|linear)(1x1)?|_x)$", "", name) or name


def has_parts(block: nn.Module, names: Mapping[str, str]) -> bool:
    """Return whether there is something at all paths of ``names`` below ``block``."""
    try:
        return all(_at(block, path) is not None for path in names.values())
    except AttributeError:
        return False


def _fits(block: nn.Module, roles: Roles) -> bool:
    theta, phi, g, o = (None if path is None else pointwise_layer(_at(block, path)) for path in roles[:4])
    if theta is None or phi is None or g is None or (roles.o is not None and o is None):
        return False
    (d, c), (e, f), (width, i) = (_channels(layer) for layer in (theta, phi, g))
    ends = (width, c) == (c, c) if o is None else _channels(o) == (c, width)
    return c == f == i and d == e and ends


def _channels(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a projection."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def channels_of(block: nn.Module, roles: Roles) -> int:
    """Return C of the maps (B, C, H, W) that ``block`` takes."""
    return _channels(pointwise_layer(_at(block, roles.theta)))[1]


def scales_of(block: nn.Module, roles: Roles) -> list[float]:
    """Return numbers that the logits may be multiplied by, likeliest first."""
    theta, g = (pointwise_layer(_at(block, path)) for path in (roles.theta, roles.g))
    (d, c), (e, _) = _channels(theta), _channels(g)
    own = [v for v in block.__dict__.values() if type(v) in (int, float) and 0 < v < 1e6]
    return list(dict.fromkeys([1.0, d**-0.5, c**-0.5, e**-0.5, *map(float, own), *(v**-0.5 for v in own)]))
