"""Checks that the metrics on features share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._checks import InputError


def check_features(name: str, features: Tensor, *, least: int) -> None:
    """Raise ``InputError`` unless ``features`` is floating-point, finite and (n, dim) with n >= ``least``."""
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise InputError(
            f"{name} must be floating-point features (n, dim), got {features.dtype} of shape {tuple(features.shape)}"
        )
    if len(features) < least:
        raise InputError(f"{name} must have at least {least} feature vectors, it has {len(features)}")
    if not torch.isfinite(features).all():
        raise InputError(f"{name} must be finite, it has NaN or infinity")


def check_pair(real: Tensor, fake: Tensor, *, least: int) -> None:
    """Raise ``InputError`` unless both are as in :func:`check_features` and of one dim."""
    check_features("real", real, least=least)
    check_features("fake", fake, least=least)
    if real.shape[1] != fake.shape[1]:
        raise InputError(f"real and fake must have features of one dim, got {real.shape[1]} and {fake.shape[1]}")
