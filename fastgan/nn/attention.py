"""Self-attention over the pixels of a feature map.

What is fused, by counting. With x of B C N elements and the canonical widths (theta, phi C/8, g C/2, M = N/4 keys),
the eager block moves about 11.8 B C N elements plus 4 B N M for its maps, in 11 launches. With Triton the maps never
exist, one kernel reads x for theta, phi, g and their pooling, one adds the output projection to x:

===========================================================  ===========  ========
step                                                         B C N moved  launches
===========================================================  ===========  ========
theta, pooled phi and g: read x, write 1/8 + 5/32            1.28         1 (+ 1 that joins the weights)
attention: read 1/8 + 5/32, write 1/2                        0.78         1
o and residual: read 1/2 + 1, write 1                        2.50         1 (+ 1 that multiplies o's weight by gamma)
===========================================================  ===========  ========

that is 4.6 B C N in 5 launches, plus one byte for each pooled value that says which pixel it came from. Drawing the q
projection into the attention kernel would save another 1/4, but every tile of q would be recomputed in each of the
three passes and x read with it; drawing o into its epilogue would save 1, but a program of the attention kernel holds
at most 256 channels of v, and o's weight would not fit beside them. The gradients of both projections are made of
library products, exact to every order.

The C++ extension does the same on a CPU. Elsewhere, and if a hook on a convolution must run, theta is one
convolution, phi and g another, pooled together, and gamma is folded into o's weight: 8.8 B C N in 10 launches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan._dispatch import autocast_dtype, is_transforming, needs_no_dispatch
from fastgan._layout import rows_of
from fastgan.backend import implementation, resolve
from fastgan.ops._attention import attend, check_attention_impl
from fastgan.ops._projections import project_and_add, project_and_pool
from fastgan.reference.attention import attention_eager

# Spellings of theta, phi and g in other people's checkpoints. fastai's softmax is over the queries.
_SPELLINGS = (
    ("query_conv", "key_conv", "value_conv"),
    ("conv1x1_theta", "conv1x1_phi", "conv1x1_g"),
    ("snconv1x1_theta", "snconv1x1_phi", "snconv1x1_g"),
    ("key.0", "query.0", "value.0"),
)
# Names that code with the softmax over the first axis uses as well as code with the softmax over the last.
_AMBIGUOUS = (("query", "key", "value"), ("q", "k", "v"), ("f", "g", "h"))
_OUTPUTS = ("o", "out", "out_conv", "conv1x1_attn", "snconv1x1_attn")
_GAMMAS = ("gamma", "sigma", "alpha")
_NAMES = ("theta", "phi", "g", "o", "gamma")
_PLAIN_FORWARDS = (nn.Conv2d.forward, nn.Conv1d.forward, nn.Linear.forward)
_PLAIN_CONV_FORWARDS = (None, nn.Conv2d._conv_forward, nn.Conv1d._conv_forward)


class AttentionSettings(NamedTuple):
    """Settings of a self-attention block that are not layers: ``scale`` multiplies the logits."""

    pool: bool
    scale: float
    impl: str


class AttentionParts(NamedTuple):
    """Layers of a self-attention block: each projection is a 1x1 ``Conv2d``, a ``Conv1d``, a ``Linear`` or holds one.

    y = x + gamma * o(attention(theta(h), phi(h), g(h))) with h = norm(x). ``o``, ``gamma`` and ``norm`` may be None.
    """

    theta: nn.Module
    phi: nn.Module
    g: nn.Module
    o: nn.Module | None = None
    gamma: Tensor | None = None
    norm: nn.Module | None = None


class SelfAttention2d(nn.Module):
    """SAGAN self-attention: y = x + gamma * o(attention(theta(x), phi(x), g(x))), gamma = 0 at the start.

    The defaults are the canonical block of the official code and of BigGAN. The other common one, with values as wide
    as x, biases, no pooling and no output convolution, is ``SelfAttention2d(c, value_channels=c, pool=False,
    bias=True)``.

    State dicts with other names load if the names say which part is which: ``conv1x1_theta ... sigma``,
    ``snconv1x1_theta ... sigma``, and ``query_conv key_conv value_conv gamma`` of 2d convolutions. ``query key value``
    and ``f g h`` do not: in half of the code that uses them the softmax runs over the queries, so that ``query`` plays
    the part of phi. Such state dicts need ``roles``; without it ``load_state_dict`` raises. fastai's ``query.0 key.0
    value.0`` are known to be exchanged.

    Args:
        in_channels: C.
        qk_channels: channels of theta and phi; C // 8 if None (C must then be divisible by 8).
        value_channels: channels of g; C // 2 if None (C must then be even). If it equals C there is no ``o``.
        pool: 2x2 max-pool of phi and g.
        bias: biases in all convolutions.
        spectral_norm: spectral normalization of all convolutions.
        scale: multiplies the logits; None for 1/sqrt(qk_channels).
        impl: "auto", "triton", "extension", "reference" or "eager". "eager" keeps the maps in memory and has
            gradients to any order; the others have them to second order.
        roles: names in the state dicts to load, by part: ``theta``, ``phi`` and ``g``, and ``o`` and ``gamma`` if they
            are not called so there. Each query's weights, over the positions of phi, sum to 1.

    Shape:
        x (B, C, H, W) -> (B, C, H, W), H and W at least 2 if pooling; any memory format. float32, bfloat16, float16,
        and float64 without Triton.

    Example:
        >>> block = SelfAttention2d(32)
        >>> block(torch.randn(2, 32, 8, 8)).shape
        torch.Size([2, 32, 8, 8])

    Source: Zhang et al. 2019, "Self-Attention Generative Adversarial Networks", arXiv 1805.08318.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        qk_channels: int | None = None,
        value_channels: int | None = None,
        pool: bool = True,
        bias: bool = False,
        spectral_norm: bool = False,
        scale: float | None = 1.0,
        impl: str = "auto",
        roles: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        check_attention_impl(impl)
        self.in_channels = in_channels
        self.qk_channels = _channels("qk_channels", qk_channels, in_channels, 8)
        self.value_channels = _channels("value_channels", value_channels, in_channels, 2)
        self.pool, self.impl = pool, impl
        self.scale = self.qk_channels**-0.5 if scale is None else float(scale)
        self.roles = None if roles is None else _checked_roles(roles)
        self.theta = nn.Conv2d(in_channels, self.qk_channels, 1, bias=bias)
        self.phi = nn.Conv2d(in_channels, self.qk_channels, 1, bias=bias)
        self.g = nn.Conv2d(in_channels, self.value_channels, 1, bias=bias)
        self.o = (
            nn.Conv2d(self.value_channels, in_channels, 1, bias=bias) if self.value_channels != in_channels else None
        )
        self.gamma = nn.Parameter(torch.zeros(1))  # FSDP2 shards no scalar of shape ()
        if spectral_norm:
            from fastgan.nn.spectral_norms import spectral_norm as normalize

            for conv in (self.theta, self.phi, self.g, self.o):
                if conv is not None:
                    normalize(conv)
        self.register_load_state_dict_pre_hook(_read_other_formats)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_attention: bool) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return y; with ``return_attention`` (y, map (B, N, M) whose rows sum to 1), the map by plain PyTorch."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if self.pool and min(x.shape[2:]) < 2:
            raise ValueError(f"x must be at least 2 x 2 pixels if keys are pooled, got {tuple(x.shape)}")
        parts = AttentionParts(self.theta, self.phi, self.g, self.o, self.gamma)
        settings = AttentionSettings(self.pool, self.scale, self.impl)
        return self_attention_and_map(x, parts, settings) if return_attention else self_attention(x, parts, settings)

    def extra_repr(self) -> str:
        if not hasattr(self, "in_channels"):  # a block of another class, fused
            return ""
        return f"{self.in_channels}, pool={self.pool}, scale={self.scale:g}, impl={self.impl!r}"


def self_attention(x: Tensor, parts: AttentionParts, settings: AttentionSettings) -> Tensor:
    """Compute y (B, C, H, W) of a self-attention block for x of the same shape."""
    if _keeps_maps(settings):
        return _residual(x, attention_eager(*_queries_keys_values(x, parts, settings), settings.scale), parts)
    impl = resolve(settings.impl, x)
    if impl != "reference" and _is_fused(parts, settings):
        return _fused(x, parts, settings, impl)
    rows = attend(*_queries_keys_values(x, parts, settings), settings.scale, settings.impl, impl)
    return _residual(x, rows, parts)


def self_attention_and_map(x: Tensor, parts: AttentionParts, settings: AttentionSettings) -> tuple[Tensor, Tensor]:
    """Compute y and the map (B, N, M) whose rows sum to 1. The gradient of y does not need the map in memory."""
    q, k, v = _queries_keys_values(x, parts, settings)
    attention_map = torch.softmax(settings.scale * (q @ k.transpose(1, 2)), dim=-1)
    if _keeps_maps(settings):
        return _residual(x, attention_map @ v, parts), attention_map
    rows = attend(q, k, v, settings.scale, settings.impl, resolve(settings.impl, x))
    return _residual(x, rows, parts), attention_map


def pointwise_layer(module: nn.Module | None) -> nn.Conv2d | nn.Conv1d | nn.Linear | None:
    """Return the 1x1 convolution or linear layer that ``module`` is or holds, or None.

    It may be held by a module that normalizes it, as ``module``, or be the first of an ``nn.Sequential``.
    """
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        plain = {*module.kernel_size, *module.stride} == {1} and module.groups == 1
        padded = module.padding != "same" and module.padding != "valid" and any(module.padding)
        return module if plain and not padded else None
    if isinstance(module, nn.Sequential) and len(module):
        return pointwise_layer(module[0])
    inner = None if module is None else module._modules.get("module")
    return None if inner is None else pointwise_layer(inner)


def _keeps_maps(settings: AttentionSettings) -> bool:
    """Return whether attention is made of torch's own operators, as a graph of ONNX or TorchScript needs it."""
    return settings.impl == "eager" or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def _is_fused(parts: AttentionParts, settings: AttentionSettings) -> bool:
    if not settings.pool or parts.o is None or is_transforming():
        return False
    return not _called_as_modules(parts.theta, parts.phi, parts.g, parts.o)


def _fused(x: Tensor, parts: AttentionParts, settings: AttentionSettings, impl: str) -> Tensor:
    h = x if parts.norm is None else parts.norm(x)
    dtype = autocast_dtype(x) or x.dtype
    weight, bias = _joined(parts.theta, parts.phi, parts.g)
    qk_channels = _outputs_of(parts.theta)
    padding = -qk_channels % 8 if impl == "triton" else 0
    if padding:  # with zeros, so that kernels load 16 bytes of each row at once, v's too, which come after k's
        weight = _padded_queries_and_keys(weight, qk_channels, padding)
        bias = None if bias is None else _padded_queries_and_keys(bias, qk_channels, padding)
        qk_channels += padding
    out_weight, out_bias = _scaled_output(parts)
    weight, out_weight = weight.to(dtype), out_weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    out_bias = None if out_bias is None else out_bias.to(dtype)
    if impl == "extension" and settings.scale > 0 and needs_no_dispatch(x, h, weight, out_weight):
        values = weight.shape[0] - 2 * qk_channels
        fits = h.shape == x.shape and weight.shape[1] == h.shape[1] and out_weight.shape == (x.shape[1], values)
        if fits and min(x.shape[2:]) > 1 and x.device == h.device == weight.device == out_weight.device:
            block = implementation("projections", impl).attention_block
            return cast(Tensor, block(h, weight, bias, qk_channels, out_weight, out_bias, x, settings.scale))
    q, kv = project_and_pool(h, weight, bias, qk_channels, impl)
    k, v = kv.split_with_sizes((qk_channels, kv.shape[2] - qk_channels), dim=2)  # faster than split
    rows = attend(q, k, v, settings.scale, settings.impl, impl)
    return project_and_add(rows, out_weight, out_bias, x, impl)


def _queries_keys_values(
    x: Tensor, parts: AttentionParts, settings: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    h = x if parts.norm is None else parts.norm(x)
    queries = _projected(parts.theta, h)
    if _called_as_modules(parts.phi, parts.g):
        maps = torch.cat((_projected(parts.phi, h), _projected(parts.g, h)), dim=1)
    else:
        weight, bias = _joined(parts.phi, parts.g)
        maps = F.conv2d(h, weight[:, :, None, None], bias)
    rows = rows_of(F.max_pool2d(maps, 2) if settings.pool else maps)
    k, v = rows.split((queries.shape[1], rows.shape[2] - queries.shape[1]), dim=2)
    return rows_of(queries), k, v


def _residual(x: Tensor, rows: Tensor, parts: AttentionParts) -> Tensor:
    features = rows.transpose(1, 2).unflatten(2, x.shape[2:])
    if parts.o is not None and not _called_as_modules(parts.o):
        weight, bias = _scaled_output(parts)
        return x + F.conv2d(features, weight[:, :, None, None], bias)
    if parts.o is not None:
        features = _projected(parts.o, features)
    return x + (features if parts.gamma is None else parts.gamma * features)


def _projected(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer`` of maps (B, C, H, W), whatever layout it takes."""
    inner = pointwise_layer(layer)
    if isinstance(inner, nn.Conv1d):
        return layer(x.flatten(2)).unflatten(2, x.shape[2:])
    if isinstance(inner, nn.Linear):
        return layer(rows_of(x)).transpose(1, 2).unflatten(2, x.shape[2:])
    return layer(x)


def _scaled_output(parts: AttentionParts) -> tuple[Tensor, Tensor | None]:
    assert parts.o is not None
    weight, bias = _parameter_of(parts.o, "weight").flatten(1), _parameter_of(parts.o, "bias")
    if parts.gamma is None:
        return weight, bias
    return parts.gamma * weight, None if bias is None else parts.gamma * bias


def _joined(*layers: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (outputs, C) and bias of one layer that does the work of all."""
    weights, biases = (
        [_parameter_of(layer, "weight") for layer in layers],
        [_parameter_of(layer, "bias") for layer in layers],
    )
    if len({weight.ndim for weight in weights}) > 1:
        weights = [weight.flatten(1) for weight in weights]
    joined = torch.cat(weights).flatten(1)
    if all(bias is None for bias in biases):
        return joined, None
    pairs = zip(weights, biases, strict=True)
    return joined, torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in pairs])


def _padded_queries_and_keys(x: Tensor, qk_channels: int, padding: int) -> Tensor:
    """Weight or bias of theta, phi and g, the first two with as many more outputs that are zero."""
    zeros = x.new_zeros(padding, *x.shape[1:])
    theta, phi, g = x.split((qk_channels, qk_channels, len(x) - 2 * qk_channels))
    return torch.cat((theta, zeros, phi, zeros, g))


def _parameter_of(module: Any, name: str) -> Any:
    """Return ``module.name`` without ``nn.Module.__getattr__``, which takes several times as long."""
    if torch.compiler.is_compiling() or name not in module._parameters:
        return getattr(module, name)
    return module._parameters[name]


def _outputs_of(layer: Any) -> int:
    """Return the rows of the weight without reading it: a read makes a norm compute it anew and update its vectors."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _called_as_modules(*layers: nn.Module) -> bool:
    """Return whether using the weights alone would bypass a hook or a forward that is not torch's own.

    The older spectral norm is a hook; layers that normalize their weight themselves have their own forward.
    """
    for layer in layers:
        cls = type(layer)
        if cls.forward not in _PLAIN_FORWARDS or getattr(cls, "_conv_forward", None) not in _PLAIN_CONV_FORWARDS:
            return True
        if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
            return True
        if "forward" in layer.__dict__:
            return True
    return False


def _channels(name: str, given: int | None, in_channels: int, divisor: int) -> int:
    if given is not None:
        if given < 1:
            raise ValueError(f"{name} must be at least 1, got {given}")
        return given
    if in_channels < divisor or in_channels % divisor:
        raise ValueError(f"in_channels must be divisible by {divisor} if {name} is not given, got {in_channels}")
    return in_channels // divisor


def _checked_roles(roles: Mapping[str, str]) -> dict[str, str]:
    if not {"theta", "phi", "g"} <= set(roles) <= set(_NAMES):
        raise ValueError(f"roles must name theta, phi and g, and may name o and gamma, got {sorted(roles)}")
    if len(set(roles.values())) != len(roles):
        raise ValueError(f"roles must be different names, got {dict(roles)}")
    exchanged = [part for part, name in roles.items() if name in ("theta", "phi") and name != part]
    if exchanged:  # a state dict of this very module looks the same as the other
        raise ValueError(f"roles must not give {exchanged[0]} the name of another part, got {roles[exchanged[0]]!r}")
    return dict(roles)


def _read_other_formats(
    module: SelfAttention2d, state_dict: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, *lists: list[str]
) -> None:
    """Rename the entries of other code's blocks and give them the shapes of this one."""
    if not _holds(state_dict, prefix, "theta"):
        names, reason = _names_in(state_dict, prefix, module.roles)
        if reason:
            lists[-1].append(reason)
        moved = {}
        for old, new in names:
            for key in [k for k in state_dict if k == prefix + old or k.startswith(f"{prefix}{old}.")]:
                moved[prefix + new + key[len(prefix) + len(old) :]] = state_dict.pop(key)
        state_dict.update(moved)
    for name in ("theta", "phi", "g", "o"):
        for suffix in ("weight", "weight_orig", "parametrizations.weight.original"):
            key = f"{prefix}{name}.{suffix}"
            if key in state_dict and state_dict[key].ndim in (2, 3):  # of a Linear or Conv1d
                state_dict[key] = state_dict[key].flatten(1)[:, :, None, None]
        if f"{prefix}{name}.u0" in state_dict:  # BigGAN's num_SVs > 1: only the first is divided by
            further = re.compile(rf"{re.escape(prefix)}{name}\.(u|sv)[1-9]\d*")
            for key in [key for key in state_dict if further.fullmatch(key)]:
                del state_dict[key]
    gamma = f"{prefix}gamma"
    if gamma in state_dict and state_dict[gamma].numel() == 1:
        state_dict[gamma] = state_dict[gamma].reshape(module.gamma.shape)


def _holds(state_dict: dict[str, Any], prefix: str, name: str) -> bool:
    return any(key.startswith(f"{prefix}{name}.") for key in state_dict)


def _names_in(
    state_dict: dict[str, Any], prefix: str, roles: Mapping[str, str] | None
) -> tuple[list[tuple[str, str]], str]:
    """Pairs of a part's name in ``state_dict`` and here, and why it cannot be loaded, if it cannot."""
    families = [tuple(roles[part] for part in _NAMES[:3])] if roles is not None else [*_SPELLINGS, *_AMBIGUOUS]
    theirs = next((f for f in families if all(_holds(state_dict, prefix, name) for name in f)), None)
    if theirs is None:
        return [], ""
    is_1d = any(k.startswith(f"{prefix}{theirs[0]}.") and v.ndim == 3 for k, v in state_dict.items())
    if roles is None and (theirs in _AMBIGUOUS or (theirs == _SPELLINGS[0] and is_1d)):
        a, b, c = theirs
        return [], (
            f"the names {a}, {b} and {c} in {prefix.rstrip('.') or 'the state dict'} do not say over which of the "
            f"first two the softmax runs. Make the SelfAttention2d with roles={{'theta': {a!r}, 'phi': {b!r}, "
            f"'g': {c!r}}} if it is over the last axis of {a}^T {b}, or with roles={{'theta': {b!r}, 'phi': {a!r}, "
            f"'g': {c!r}}} if it is over the first, as in fastai, DeOldify and the paper's formula."
        )
    given = roles or {}
    rest = [(name, "o") for name in ([given["o"]] if "o" in given else _OUTPUTS) if name not in theirs]
    rest += [(name, "gamma") for name in ([given["gamma"]] if "gamma" in given else _GAMMAS)]
    return [*zip(theirs, _NAMES[:3], strict=True), *rest], ""
