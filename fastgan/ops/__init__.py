"""Custom ops, differentiable twice: schema, fake, dispatch and autograd of each in a file of its name."""

from fastgan.ops.attention import attention
from fastgan.ops.spectral_norm import spectral_norm_scale, spectral_norm_update

__all__ = ["attention", "spectral_norm_scale", "spectral_norm_update"]
