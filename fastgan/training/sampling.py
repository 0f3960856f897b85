"""Images from a generator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgan.models import check_labels


def class_rows(n_classes: int, per_class: int) -> Tensor:
    """Labels of a grid with a row a class: 0 ... 0, 1 ... 1, and so on, int64 (n_classes * per_class,)."""
    return torch.arange(n_classes).repeat_interleave(per_class)


def sample(
    generator: nn.Module,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 100,
    truncation: float | None = None,
    sketches: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Generate one image for each label, in eval mode; each module's mode is restored after.

    Noise is drawn on the CPU from a generator of its own, image by image in order: the same seed gives the same images
    on every device and for every batch size, to rounding.

    Args:
        generator: a network with ``n_classes`` and ``dim_z``, called as ``generator(z, labels)``; one with
            ``sketch_channels`` is called as ``generator(sketches, labels)``.
        labels: int64 (n,), each in [0, n_classes); for an unconditional generator only their number counts.
        seed: of the noise.
        batch_size: images at a time.
        truncation: noise is drawn from the normal distribution cut off at plus and minus this; None for all of it.
        sketches: (n, channels, h, w) in [-1, 1], for a generator that starts from them, and only for such.
        on_batch: told the number of images after each batch.

    Returns:
        (n, channels, h, w) in [-1, 1], on the generator's device.

    Raises:
        ValueError: a label is out of range, ``labels`` is empty, or sketches are missing or not wanted.
    """
    _check(generator, labels, batch_size, truncation)
    if getattr(generator, "sketch_channels", 0):
        if sketches is None or len(sketches) != len(labels):
            got = "None" if sketches is None else len(sketches)
            raise ValueError(f"sketches must be given, one for each of the {len(labels)} labels, got {got}")
        return _generate(generator, sketches, labels, batch_size, on_batch)
    if sketches is not None:
        raise ValueError("sketches must be None for a generator that starts from noise")
    z = noise((len(labels), int(generator.dim_z)), seed, truncation)  # type: ignore[arg-type]
    return _generate(generator, z, labels, batch_size, on_batch)


def interpolate(
    generator: nn.Module, labels: Tensor, steps: int, *, seed: int = 0, truncation: float | None = None
) -> Tensor:
    """Images along the great circle between two random noise vectors, a row of ``steps`` for each label.

    Args:
        generator: one that starts from noise.
        labels: int64 (rows,).
        steps: images a row, at least 2; the first and the last are those of the two vectors.
        seed, truncation: as in :func:`sample`.

    Returns:
        (rows * steps, channels, h, w) in [-1, 1], row by row.

    Raises:
        ValueError: as :func:`sample`, or there are fewer than two steps, or the generator starts from sketches.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if getattr(generator, "sketch_channels", 0):
        raise ValueError("a generator that starts from sketches has no noise to interpolate")
    _check(generator, labels, steps, truncation)
    dim_z = int(generator.dim_z)  # type: ignore[arg-type]
    first, last = noise((2, len(labels), dim_z), seed, truncation).double()
    part = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None, None]
    rows = _slerp(first, last, part).transpose(0, 1).reshape(-1, dim_z).float()
    return _generate(generator, rows, labels.repeat_interleave(steps), 100, None)


def _slerp(first: Tensor, last: Tensor, part: Tensor) -> Tensor:
    """Spherical interpolation of the directions, linear in the lengths."""
    lengths = first.norm(dim=-1, keepdim=True), last.norm(dim=-1, keepdim=True)
    cosine = (first * last).sum(-1, keepdim=True) / (lengths[0] * lengths[1]).clamp_min(1e-12)
    angle = cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    return ((1 - part) * angle).sin() / angle.sin() * first + (part * angle).sin() / angle.sin() * last


def noise(shape: tuple[int, ...], seed: int, truncation: float | None = None) -> Tensor:
    """Normal noise from a generator of its own on the CPU, cut off at ``truncation``: drawn by the inverse of the
    distribution function, so that every number costs one draw."""
    rng = torch.Generator().manual_seed(seed)
    if truncation is None:
        return torch.randn(shape, generator=rng)
    tail = 0.5 * math.erfc(truncation / math.sqrt(2))
    u = torch.rand(shape, generator=rng, dtype=torch.float64)
    return torch.special.ndtri(tail + u * (1 - 2 * tail)).clamp(-truncation, truncation).float()


def _check(generator: nn.Module, labels: Tensor, batch_size: int, truncation: float | None) -> None:
    if generator.n_classes:
        check_labels(labels, generator.n_classes)  # type: ignore[arg-type]
    if not len(labels):
        raise ValueError("labels must hold at least one label, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if truncation is not None and not truncation > 0:
        raise ValueError(f"truncation must be positive, got {truncation}")


@torch.no_grad()
def _generate(
    generator: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int, on_batch: Callable[[int], None] | None
) -> Tensor:
    parameter = next(generator.parameters())
    inputs, labels = inputs.to(parameter), labels.to(parameter.device)
    modes = [(module, module.training) for module in generator.modules()]
    generator.eval()
    try:
        images = []
        for part, label_batch in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            images.append(generator(part, label_batch))
            if on_batch is not None:
                on_batch(len(label_batch))
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(images)
