"""Drop-in modules over :mod:`fastgan.ops`."""

from fastgan.nn.attention import SelfAttention2d
from fastgan.nn.fusion.replace import FuseReport, fuse, unfuse
from fastgan.nn.second_order import second_order_attention
from fastgan.nn.spectral_norm_group import group_spectral_norm
from fastgan.nn.spectral_norms import spectral_norm

__all__ = [
    "FuseReport",
    "SelfAttention2d",
    "fuse",
    "group_spectral_norm",
    "second_order_attention",
    "spectral_norm",
    "unfuse",
]
