"""Custom ops, differentiable twice: schema, fake, dispatch and autograd of each in a file of its name."""

from fastgan.ops._attention import attention
from fastgan.ops._projections import pooled_projection, projection_residual
from fastgan.ops._scaled_dot_product_attention import scaled_dot_product_attention
from fastgan.ops._spectral_norm import spectral_norm_scale, spectral_norm_update

__all__ = [
    "attention",
    "pooled_projection",
    "projection_residual",
    "scaled_dot_product_attention",
    "spectral_norm_scale",
    "spectral_norm_update",
]
