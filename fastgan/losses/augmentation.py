"""Differentiable augmentation of both real and generated images, for small data sets.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020. Random numbers are
separate from arithmetic: :func:`augment_draws` lists the numbers to draw, :func:`augment` uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan._checks import check_tensor
from fastgan.losses.noise import Draw, integers, uniform

SHIFT_RATIO = 0.125
CUTOUT_RATIO = 0.5


def color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Shift the brightness, then scale saturation and contrast, of each image.

    Args:
        images: (n, channels, h, w) in [-1, 1].
        brightness: (n, 1, 1, 1), added.
        saturation: (n, 1, 1, 1), a factor of the distance to the pixel's gray.
        contrast: (n, 1, 1, 1), a factor of the distance to the image's mean.
    """
    images = images + brightness
    gray = images.mean(1, keepdim=True)
    images = (images - gray) * saturation + gray
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * contrast + mean


def translate(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Shift each image by its own whole number of pixels and fill in black (-1).

    Args:
        images: (n, channels, h, w) in [-1, 1].
        rows, columns: int64 (n, 1); output pixel (y, x) is input pixel (y + rows, x + columns).
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    y = _shifted_index(rows, height)
    x = _shifted_index(columns, width)
    batch = torch.arange(n, device=images.device)[:, None, None]
    # Advanced indices on either side of a slice put the channels last.
    return padded[batch, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def _shifted_index(shift: Tensor, size: int) -> Tensor:
    """For each image the padded row that each output row reads; outside the image that is the padding."""
    return (torch.arange(size, device=shift.device) + shift + 1).clamp(0, size + 1)


def cutout(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Set a square of half the side to mid-gray (0) around each image's (rows, columns), int64 (n, 1)."""
    height, width = images.shape[2:]
    inside = _window(rows, height)[:, :, None] & _window(columns, width)[:, None, :]
    return images * (~inside)[:, None].to(images.dtype)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror each image left to right if its ``mirrored``, int64 (n, 1, 1, 1), is 1."""
    return torch.where(mirrored.bool(), images.flip(3), images)


def _window(center: Tensor, size: int) -> Tensor:
    """(n, size) bool: within half the cut-out's length of ``center``."""
    length = int(size * CUTOUT_RATIO + 0.5)
    start = center - length // 2
    index = torch.arange(size, device=center.device)
    return (index >= start) & (index < start + length)


def _color_draws(n: int, height: int, width: int) -> dict[str, Draw]:
    shape = (n, 1, 1, 1)
    return {
        "brightness": uniform(*shape, low=-0.5, high=0.5),
        "saturation": uniform(*shape, low=0, high=2),
        "contrast": uniform(*shape, low=0.5, high=1.5),
    }


def _translation_draws(n: int, height: int, width: int) -> dict[str, Draw]:
    reach = {"rows": int(height * SHIFT_RATIO + 0.5), "columns": int(width * SHIFT_RATIO + 0.5)}
    return {name: integers(n, 1, low=-pixels, high=pixels + 1) for name, pixels in reach.items()}


def _cutout_draws(n: int, height: int, width: int) -> dict[str, Draw]:
    sides = {"rows": height, "columns": width}
    return {name: integers(n, 1, high=side + 1 - int(side * CUTOUT_RATIO + 0.5) % 2) for name, side in sides.items()}


def _flip_draws(n: int, height: int, width: int) -> dict[str, Draw]:
    return {"mirrored": integers(n, 1, 1, 1, high=2)}


@dataclass(frozen=True)
class Augmentation:
    """``apply(images, **drawn)`` and ``draws(n, height, width)``, the numbers that it needs."""

    apply: Callable[..., Tensor]
    draws: Callable[[int, int, int], dict[str, Draw]]


AUGMENTATIONS = {
    "color": Augmentation(color, _color_draws),
    "translation": Augmentation(translate, _translation_draws),
    "cutout": Augmentation(cutout, _cutout_draws),
    "flip": Augmentation(flip, _flip_draws),
}


def check_policy(policy: Sequence[str]) -> None:
    """Raise ``ValueError`` for a name that is not in :data:`AUGMENTATIONS`."""
    for name in policy:
        if name not in AUGMENTATIONS:
            raise ValueError(f"augment must be names out of {', '.join(map(repr, AUGMENTATIONS))}, got {name!r}")


def augment_draws(policy: Sequence[str], n: int, height: int, width: int, prefix: str = "augment") -> dict[str, Draw]:
    """Describe the draws that :func:`augment` needs for ``n`` images: keys ``<prefix>.<augmentation>.<number>``.

    Example:
        >>> sorted(augment_draws(["flip"], 4, 8, 8))
        ['augment.flip.mirrored']
    """
    check_policy(policy)
    return {
        f"{prefix}.{name}.{key}": spec
        for name in policy
        for key, spec in AUGMENTATIONS[name].draws(n, height, width).items()
    }


def augment(images: Tensor, policy: Sequence[str], drawn: Mapping[str, Tensor], prefix: str = "augment") -> Tensor:
    """Apply the augmentations named in ``policy``, in order, with the numbers that :func:`augment_draws` asked for.

    Raises:
        ValueError: a name is not in :data:`AUGMENTATIONS`, ``images`` is not (n, channels, h, w), or ``drawn`` lacks
            numbers or has them for another n.

    Example:
        >>> images = torch.rand(4, 3, 8, 8)
        >>> drawn = draw(augment_draws(["flip", "translation"], 4, 8, 8), None, "cpu")
        >>> augment(images, ["flip", "translation"], drawn).shape
        torch.Size([4, 3, 8, 8])
    """
    check_tensor("images", images, ndim=4)
    check_policy(policy)
    n, _, height, width = images.shape
    for name in policy:
        specs = AUGMENTATIONS[name].draws(n, height, width)
        numbers = {key: _number(drawn, f"{prefix}.{name}.{key}", spec) for key, spec in specs.items()}
        images = AUGMENTATIONS[name].apply(images, **numbers)
    return images


def _number(drawn: Mapping[str, Tensor], key: str, spec: Draw) -> Tensor:
    got = tuple(drawn[key].shape) if key in drawn else None
    if got != spec.shape:
        raise ValueError(f"drawn must hold {key!r} of shape {spec.shape}, as augment_draws says, got {got}")
    return drawn[key]


class AdaptiveAugment(nn.Module):
    """Augmentation of each image with a probability that grows while the discriminator is too sure of real images.

    Call it on real and generated images, and :meth:`adjust_` with the logits of real ones, in the discriminator's loss.
    Make it a part of the discriminator, and the probability is saved with it and averaged over processes.

    Args:
        policy: names in :data:`AUGMENTATIONS`. An image gets all of them or none.
        target: mean sign of real images' logits that is aimed at.
        images: number of real images over which the probability may go from 0 to 1.
        device: of the probability.

    Attributes:
        p: the probability, a scalar buffer that is written in place, so that a captured step can hold it.

    Raises:
        ValueError: an unknown augmentation, ``target`` outside (-1, 1), or ``images`` below 1.

    Source: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", arXiv 2006.06676.

    Example:
        >>> from fastgan.losses import draw
        >>> module = AdaptiveAugment(("color",), images=1000)
        >>> drawn = draw(module.draws(2, 8, 8), None, "cpu")
        >>> module(torch.zeros(2, 3, 8, 8), drawn).shape
        torch.Size([2, 3, 8, 8])
        >>> module.adjust_(torch.ones(100))
        >>> module.p
        tensor(0.1000)
    """

    p: Tensor

    def __init__(
        self,
        policy: Sequence[str] = ("color", "translation", "cutout"),
        *,
        target: float = 0.6,
        images: int = 500_000,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_policy(policy)
        if not -1 < target < 1:
            raise ValueError(f"target must be in (-1, 1), got {target}")
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        self.policy, self.target, self.images = tuple(policy), target, images
        self.register_buffer("p", torch.zeros((), device=device))

    def draws(self, n: int, height: int, width: int, prefix: str = "augment") -> dict[str, Draw]:
        """Describe the draws that a call needs for ``n`` images."""
        return augment_draws(self.policy, n, height, width, prefix) | {f"{prefix}.chosen": uniform(n, 1, 1, 1)}

    def forward(self, images: Tensor, drawn: Mapping[str, Tensor], prefix: str = "augment") -> Tensor:
        """Augment each image with probability :attr:`p`; (n, channels, h, w) in [-1, 1]."""
        augmented = augment(images, self.policy, drawn, prefix)
        chosen = _number(drawn, f"{prefix}.chosen", uniform(len(images), 1, 1, 1))
        return torch.where(chosen < self.p, augmented, images)

    @torch.no_grad()
    def adjust_(self, real_logits: Tensor) -> None:
        """Raise :attr:`p` if the logits of real images, of any shape, exceed the target, and lower it otherwise."""
        check_tensor("real_logits", real_logits)
        excess = (real_logits.float().sign().mean() - self.target).sign()
        self.p.add_(excess * (real_logits.numel() / self.images)).clamp_(0, 1)
