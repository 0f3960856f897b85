"""Images from a generator."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.data import LabeledImages
from fastgan.models import check_labels


def class_rows(n_classes: int, per_class: int) -> Tensor:
    """Return labels for a grid with one row per class: 0 ... 0, 1 ... 1, and so on, int64 (n_classes * per_class,).

    Example:
        >>> class_rows(2, 3)
        tensor([0, 0, 0, 1, 1, 1])
    """
    return torch.arange(n_classes).repeat_interleave(per_class)


def held_out_index(held_out: LabeledImages, labels: Tensor) -> Tensor:
    """Return the index of a held-out image for each label. The images of a class take turns.

    Raises:
        ValueError: a class has no held-out image.
    """
    classes, chosen = held_out.labels.cpu(), torch.zeros_like(labels)
    for label in labels.unique().tolist():
        members, wanted = torch.nonzero(classes == label).squeeze(1), labels == label
        if not len(members):
            raise ValueError(f"the run has no held-out image of class {label}, so there is no sketch of it")
        chosen[wanted] = members[torch.arange(int(wanted.sum())) % len(members)]
    return chosen.to(held_out.labels.device)


@torch.no_grad()
def standing_statistics_(generator: nn.Module, inputs: Iterable[tuple[Any, ...]]) -> None:
    """Replace batch norm's running statistics by their means over a few batches, for sampling in eval mode.

    Weights, singular vectors, modes and all other buffers are unchanged.

    Args:
        generator: called as ``generator(*args)`` for each of ``inputs``.
        inputs: positional arguments of each batch, such as ``(z, labels)``; the published code uses 16 batches.

    Raises:
        ValueError: there is no batch norm with running statistics, or no input.

    Source: Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", arXiv 1809.11096.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> standing_statistics_(net, ((torch.randn(32, 4),) for _ in range(16)))
    """
    norms = [m for m in generator.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError("generator must have batch norm with running statistics, it has none")
    modes, momenta = {m: m.training for m in generator.modules()}, [m.momentum for m in norms]
    batches = 0
    generator.eval()
    for norm in norms:
        norm.train()
    try:
        for args in inputs:
            if not batches:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # the mean over all batches
            generator(*args)
            batches += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if not batches:
        raise ValueError("inputs must have at least one batch, it has none")


def sample(
    generator: nn.Module,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 100,
    truncation: float | None = None,
    sketches: Tensor | None = None,
) -> Tensor:
    """Generate one image per label in eval mode. Each module's mode is restored afterwards.

    Noise comes from a CPU generator of its own, so that a seed gives the same images, up to rounding, on every device
    and for every batch size.

    Args:
        generator: a network with ``n_classes`` and ``dim_z``, called as ``generator(z, labels)``; one with
            ``sketch_channels`` is called as ``generator(sketches, labels)``.
        labels: int64 (n,), each in [0, n_classes); an unconditional generator uses only their number.
        seed: random seed of the noise.
        batch_size: number of images generated together.
        truncation: largest absolute value of the noise, whose normal distribution is cut off there; None for no bound.
        sketches: (n, channels, h, w) in [-1, 1]; only for a generator that starts from sketches, which needs them.

    Returns:
        (n, channels, h, w) in [-1, 1], on the generator's device.

    Raises:
        ValueError: a label is out of range, ``labels`` is empty, or sketches are missing or not needed.

    Example:
        >>> generator = DCGANGenerator(10, resolution=32, width=8)
        >>> sample(generator, class_rows(10, 2)).shape
        torch.Size([20, 3, 32, 32])
    """
    _check(generator, labels, batch_size, truncation)
    if getattr(generator, "sketch_channels", 0):
        if sketches is None or len(sketches) != len(labels):
            got = "None" if sketches is None else len(sketches)
            raise ValueError(f"sketches must be given, one for each of the {len(labels)} labels, got {got}")
        return _generate(generator, sketches, labels, batch_size)
    if sketches is not None:
        raise ValueError("sketches must be None for a generator that starts from noise")
    z = noise((len(labels), int(generator.dim_z)), seed, truncation)  # type: ignore[arg-type]
    return _generate(generator, z, labels, batch_size)


def interpolate(
    generator: nn.Module, labels: Tensor, steps: int, *, seed: int = 0, truncation: float | None = None
) -> Tensor:
    """Generate one row of images per label, along the great circle between two random noise vectors.

    Args:
        generator: one that starts from noise.
        labels: int64 (rows,).
        steps: images per row, at least 2; the first and the last belong to the two vectors.
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
    # Spherical interpolation of the directions, linear in the lengths.
    lengths = first.norm(dim=-1, keepdim=True) * last.norm(dim=-1, keepdim=True)
    cosine = (first * last).sum(-1, keepdim=True) / lengths.clamp_min(1e-12)
    angle = cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    part = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None, None]
    rows = ((1 - part) * angle).sin() / angle.sin() * first + (part * angle).sin() / angle.sin() * last
    rows = rows.transpose(0, 1).reshape(-1, dim_z).float()
    return _generate(generator, rows, labels.repeat_interleave(steps), 100)


def noise(shape: tuple[int, ...], seed: int, truncation: float | None = None) -> Tensor:
    """Draw normal noise from a CPU generator of its own, cut off at ``truncation``.

    Each value inverts the distribution function at one uniform draw. ``torch.nn.init.trunc_normal_`` is not used: its
    rule for rejecting draws differs between releases of torch, so that a seed would give other images.
    """
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
def _generate(generator: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    parameter = next(generator.parameters())
    inputs, labels = inputs.to(parameter), labels.to(parameter.device)
    modes = [(module, module.training) for module in generator.modules()]
    generator.eval()
    try:
        batches = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
        return torch.cat([generator(*batch) for batch in batches])
    finally:
        for module, training in modes:
            module.training = training
