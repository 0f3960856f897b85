"""Self-attention over the pixels of a feature map.

What is fused, by counting. With x of B C N elements and the canonical widths (theta, phi C/8, g C/2, M = N/4 keys),
the eager block moves about 11.8 B C N elements plus 4 B N M for its maps, in 11 launches. Here the maps never exist,
phi and g are one convolution and one pooling, and gamma is folded into o's weight:

=====================================  ===========  ========
step                                   B C N moved  launches
=====================================  ===========  ========
theta: read x, write C/8               1.13         1
phi and g together: read x, write 5/8  1.63         1 (+ 1 that joins the weights)
max-pool of both: read 5/8, write 5/32 0.78         1
attention: read 1/8 + 5/32, write 1/2  0.78         1
gamma o: read 1/2, write 1             1.50         1 (+ 1 that scales the weight)
residual: read 2, write 1              3.00         1
=====================================  ===========  ========

that is 8.8 B C N in 8 launches, all but the attention by the libraries' own convolutions, whose second-order
gradients are exact. One convolution for all three would save another read of x, but its slice for the max-pool would
have to be copied.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.backend import check_impl
from fastgan.ops.attention import attention
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
            from fastgan.nn.spectral_norm import spectral_norm as normalise

            for conv in self._convolutions():
                normalise(conv)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_attention: bool) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return y; with ``return_attention`` (y, map (B, N, M) whose rows sum to 1), by plain PyTorch."""
        self._check(x)
        q = _rows(self.theta(x))
        kv = self._keys_and_values(x)
        if self.pool:
            kv = F.max_pool2d(kv, 2)
        k, v = _rows(kv).split((self.qk_channels, self.value_channels), dim=2)
        if return_attention:
            attention_map = torch.softmax(self.scale * (q @ k.transpose(1, 2)), dim=-1)
            return self._residual(x, attention_map @ v), attention_map
        if torch.onnx.is_in_onnx_export():
            return self._residual(x, attention_eager(q, k, v, self.scale))
        return self._residual(x, attention(q, k, v, self.scale, self.impl))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, pool={self.pool}, scale={self.scale:g}, impl={self.impl!r}"

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if self.pool and min(x.shape[2:]) < 2:
            raise ValueError(f"x must be at least 2 x 2 pixels where keys are pooled, got {tuple(x.shape)}")

    def _keys_and_values(self, x: Tensor) -> Tensor:
        if _called_as_modules(self.phi, self.g):
            return torch.cat((self.phi(x), self.g(x)), dim=1)
        weight = torch.cat((self.phi.weight, self.g.weight))
        bias = None if self.phi.bias is None or self.g.bias is None else torch.cat((self.phi.bias, self.g.bias))
        return F.conv2d(x, weight, bias)

    def _residual(self, x: Tensor, rows: Tensor) -> Tensor:
        features = rows.transpose(1, 2).unflatten(2, x.shape[2:])
        if self.o is None:
            return x + self.gamma * features
        if _called_as_modules(self.o):
            return x + self.gamma * self.o(features)
        bias = None if self.o.bias is None else self.gamma * self.o.bias
        return x + F.conv2d(features, self.gamma * self.o.weight, bias)

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


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), a view."""
    return x.flatten(2).transpose(1, 2)


def _called_as_modules(*modules: nn.Module) -> bool:
    """True where using the weights alone would pass by a hook (the older spectral norm is one) or a replaced module."""
    return any(
        m._forward_pre_hooks or m._forward_hooks or m._backward_hooks or not isinstance(m, nn.Conv2d) for m in modules
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
