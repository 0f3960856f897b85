"""Differentiable augmentation of both real and generated images (Zhao et al. 2020), for small data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.checks import check_tensor


def translate(images: Tensor, rng: torch.Generator, ratio: float = 0.125) -> Tensor:
    """Shift each image by its own whole number of pixels, up to ``ratio`` of its side, and fill in black (-1).

    Args:
        images: (n, channels, h, w) in [-1, 1].
        rng: generator on the device of ``images``.
        ratio: the largest shift over the side.
    """
    n, _, height, width = images.shape
    rows = _shifted_index(n, height, ratio, rng)
    columns = _shifted_index(n, width, ratio, rng)
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    batch = torch.arange(n, device=images.device)[:, None, None]
    # Advanced indices on either side of a slice put the channels last.
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _shifted_index(n: int, size: int, ratio: float, rng: torch.Generator) -> Tensor:
    """For each of ``n`` images the padded row that each output row reads; outside the image that is the padding."""
    reach = int(size * ratio + 0.5)
    shift = torch.randint(-reach, reach + 1, (n, 1), generator=rng, device=rng.device)
    return (torch.arange(size, device=rng.device) + shift + 1).clamp_(0, size + 1)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"translation": translate}


def augment(images: Tensor, policy: Sequence[str], rng: torch.Generator) -> Tensor:
    """Apply the augmentations named in ``policy``, in order.

    Raises:
        ValueError: a name is not in :data:`AUGMENTATIONS`, or ``images`` is not (n, channels, h, w).
    """
    check_tensor("images", images, ndim=4)
    check_policy(policy)
    for name in policy:
        images = AUGMENTATIONS[name](images, rng)
    return images


def check_policy(policy: Sequence[str]) -> None:
    """Raise ``ValueError`` for a name that is not in :data:`AUGMENTATIONS`."""
    for name in policy:
        if name not in AUGMENTATIONS:
            raise ValueError(f"augment must be names out of {', '.join(map(repr, AUGMENTATIONS))}, got {name!r}")
