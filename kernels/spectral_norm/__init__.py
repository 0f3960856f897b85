"""Power iterations, scaling and gradients of all weights of a network at once."""

from fastgan.kernels.spectral_norm.launch import scale, scale_bwd, scale_bwd_bwd, update

__all__ = ["scale", "scale_bwd", "scale_bwd_bwd", "update"]
