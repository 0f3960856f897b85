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

Elsewhere (and where a hook on a convolution must run) theta is one convolution, phi and g another, pooled together,
and gamma is folded into o's weight: 8.8 B C N in 10 launches.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan._dispatch import autocast_dtype, is_transforming
from fastgan._layout import rows_of
from fastgan.backend import check_impl, resolve
from fastgan.ops._attention import attend
from fastgan.ops._projections import project_and_add, project_and_pool
from fastgan.reference.attention import attention_eager

# Spellings of theta, phi, g, o and gamma in other people's checkpoints; a family is known by its first name.
_SPELLINGS = (
    ("query_conv", "key_conv", "value_conv", "out_conv", "gamma"),
    ("query", "key", "value", "out", "gamma"),
    ("conv1x1_theta", "conv1x1_phi", "conv1x1_g", "conv1x1_attn", "sigma"),
    ("snconv1x1_theta", "snconv1x1_phi", "snconv1x1_g", "snconv1x1_attn", "sigma"),
    ("f", "g", "h", "o", "gamma"),
)
_NAMES = ("theta", "phi", "g", "o", "gamma")


class SelfAttention2d(nn.Module):
    """SAGAN self-attention: y = x + gamma * o(attention(theta(x), phi(x), g(x))), gamma = 0 at the start.

    The defaults are the canonical block of the official code and of BigGAN. The other common one, with values as wide
    as x, biases, no pooling and no output convolution, is ``SelfAttention2d(c, value_channels=c, pool=False,
    bias=True)``. State dicts of the usual spellings (``theta phi g o gamma``, ``query_conv key_conv value_conv
    gamma``, ``snconv1x1_theta ... sigma``, ``f g h o gamma``) load as they are.

    Args:
        in_channels: C.
        qk_channels: channels of theta and phi; C // 8 if None (C must then be divisible by 8).
        value_channels: channels of g; C // 2 if None (C must then be even). If it equals C there is no ``o``.
        pool: 2x2 max-pool of phi and g.
        bias: biases in all convolutions.
        spectral_norm: spectral normalisation of all convolutions.
        scale: multiplies the logits; None for 1/sqrt(qk_channels).
        impl: "auto", "triton" or "reference".

    Shape:
        x (B, C, H, W) -> (B, C, H, W), H and W at least 2 where pooling; any memory format. float32, bfloat16,
        float16, and float64 on the reference path. Gradients exist to second order.

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
    ) -> None:
        super().__init__()
        check_impl(impl)
        self.in_channels = in_channels
        self.qk_channels = _channels("qk_channels", qk_channels, in_channels, 8)
        self.value_channels = _channels("value_channels", value_channels, in_channels, 2)
        self.pool, self.impl = pool, impl
        self.scale = self.qk_channels**-0.5 if scale is None else float(scale)
        self.theta = nn.Conv2d(in_channels, self.qk_channels, 1, bias=bias)
        self.phi = nn.Conv2d(in_channels, self.qk_channels, 1, bias=bias)
        self.g = nn.Conv2d(in_channels, self.value_channels, 1, bias=bias)
        self.o = (
            nn.Conv2d(self.value_channels, in_channels, 1, bias=bias) if self.value_channels != in_channels else None
        )
        self.gamma = nn.Parameter(torch.zeros(()))
        if spectral_norm:
            from fastgan.nn.spectral_norms import spectral_norm as normalise

            for conv in self._convolutions():
                normalise(conv)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_attention: bool) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return y; with ``return_attention`` (y, map (B, N, M) whose rows sum to 1), by plain PyTorch."""
        self._check(x)
        if return_attention:
            return self._with_map(x)
        if torch.onnx.is_in_onnx_export():
            return self._residual(x, attention_eager(*self._queries_keys_values(x), self.scale))
        impl = resolve(self.impl, x)
        if impl == "triton" and self._is_fused():
            return self._fused(x)
        return self._residual(x, attend(*self._queries_keys_values(x), self.scale, self.impl, impl))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, pool={self.pool}, scale={self.scale:g}, impl={self.impl!r}"

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if self.pool and min(x.shape[2:]) < 2:
            raise ValueError(f"x must be at least 2 x 2 pixels where keys are pooled, got {tuple(x.shape)}")

    def _is_fused(self) -> bool:
        if not self.pool or self.o is None or is_transforming():
            return False
        return not _called_as_modules(*self._convolutions())

    def _fused(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) or x.dtype
        weight, bias = _joined(self.theta, self.phi, self.g)
        bias = None if bias is None else bias.to(dtype)
        q, kv = project_and_pool(x, weight.flatten(1).to(dtype), bias, self.qk_channels, "triton")
        k, v = kv.split((self.qk_channels, self.value_channels), dim=2)
        rows = attend(q, k, v, self.scale, self.impl, "triton")
        weight, bias = self._scaled_output()
        bias = None if bias is None else bias.to(dtype)
        return project_and_add(rows, weight.flatten(1).to(dtype), bias, x, "triton")

    def _with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self._queries_keys_values(x)
        attention_map = torch.softmax(self.scale * (q @ k.transpose(1, 2)), dim=-1)
        return self._residual(x, attention_map @ v), attention_map

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, kv = rows_of(self.theta(x)), self._keys_and_values(x)
        k, v = rows_of(F.max_pool2d(kv, 2) if self.pool else kv).split((self.qk_channels, self.value_channels), dim=2)
        return q, k, v

    def _keys_and_values(self, x: Tensor) -> Tensor:
        if _called_as_modules(self.phi, self.g):
            return torch.cat((self.phi(x), self.g(x)), dim=1)
        return F.conv2d(x, *_joined(self.phi, self.g))

    def _residual(self, x: Tensor, rows: Tensor) -> Tensor:
        features = rows.transpose(1, 2).unflatten(2, x.shape[2:])
        if self.o is None:
            return x + self.gamma * features
        if _called_as_modules(self.o):
            return x + self.gamma * self.o(features)
        return x + F.conv2d(features, *self._scaled_output())

    def _scaled_output(self) -> tuple[Tensor, Tensor | None]:
        assert self.o is not None
        return self.gamma * self.o.weight, None if self.o.bias is None else self.gamma * self.o.bias

    def _convolutions(self) -> list[nn.Conv2d]:
        return [conv for conv in (self.theta, self.phi, self.g, self.o) if conv is not None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename(state_dict, prefix)
        for name in ("theta", "phi", "g", "o"):  # some keep 1x1 convolutions as Conv1d or Linear
            for suffix in ("weight", "weight_orig", "parametrizations.weight.original"):
                key = f"{prefix}{name}.{suffix}"
                if key in state_dict and state_dict[key].ndim in (2, 3):
                    state_dict[key] = state_dict[key].flatten(1)[:, :, None, None]
        gamma = f"{prefix}gamma"
        if gamma in state_dict and state_dict[gamma].numel() == 1:
            state_dict[gamma] = state_dict[gamma].reshape(())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _channels(name: str, given: int | None, in_channels: int, divisor: int) -> int:
    if given is not None:
        if given < 1:
            raise ValueError(f"{name} must be at least 1, got {given}")
        return given
    if in_channels < divisor or in_channels % divisor:
        raise ValueError(f"in_channels must be divisible by {divisor} where {name} is not given, got {in_channels}")
    return in_channels // divisor


def _joined(*convs: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one convolution that does the work of all."""
    weight = torch.cat([conv.weight for conv in convs])
    if all(conv.bias is None for conv in convs):
        return weight, None
    return weight, torch.cat([weight.new_zeros(c.out_channels) if c.bias is None else c.bias for c in convs])


def _called_as_modules(*modules: nn.Module) -> bool:
    """True where using the weights alone would pass by a hook (the older spectral norm is one) or a forward that is
    not :class:`nn.Conv2d`'s, as that of layers which normalise their weight themselves."""
    return any(
        m._forward_pre_hooks
        or m._forward_hooks
        or m._backward_pre_hooks
        or m._backward_hooks
        or type(m).forward is not nn.Conv2d.forward
        or "forward" in m.__dict__
        for m in modules
    )


def _rename(state_dict: dict[str, Any], prefix: str) -> None:
    for spelling in _SPELLINGS:
        if any(key.startswith(f"{prefix}{spelling[0]}.") for key in state_dict):
            moved = {}
            for old, new in zip(spelling, _NAMES, strict=True):
                for key in [k for k in state_dict if k == prefix + old or k.startswith(f"{prefix}{old}.")]:
                    moved[prefix + new + key[len(prefix) + len(old) :]] = state_dict.pop(key)
            state_dict.update(moved)
            return
