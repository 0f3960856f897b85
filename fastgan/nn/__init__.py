"""Drop-in modules over :mod:`fastgan.ops`."""

from fastgan.nn.attention import SelfAttention2d
from fastgan.nn.fusion.replace import FuseReport, fuse, unfuse
from fastgan.nn.spectral_norm_group import group_spectral_norm
from fastgan.nn.spectral_norms import spectral_norm

__all__ = ["FuseReport", "SelfAttention2d", "fuse", "group_spectral_norm", "spectral_norm", "unfuse"]
