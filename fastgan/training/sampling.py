"""Images from a conditional generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgan.models import check_labels


def class_rows(n_classes: int, per_class: int) -> Tensor:
    """Labels of a grid with a row a class: 0 ... 0, 1 ... 1, and so on, int64 (n_classes * per_class,)."""
    return torch.arange(n_classes).repeat_interleave(per_class)


@torch.no_grad()
def sample(
    generator: nn.Module,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 100,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Generate one image for each label, in eval mode; the mode is restored after.

    Noise is drawn on the CPU from a generator of its own, image by image in order: the same seed gives the same images
    on every device and for every batch size, to rounding.

    Args:
        generator: a network with ``n_classes`` and ``dim_z``, called as ``generator(z, labels)``.
        labels: int64 (n,), each in [0, n_classes).
        seed: of the noise.
        batch_size: images at a time.
        on_batch: told the number of images after each batch.

    Returns:
        (n, channels, h, w) in [-1, 1], on the generator's device.

    Raises:
        ValueError: a label is out of range, or ``labels`` is empty.
    """
    parameter = next(generator.parameters())
    check_labels(labels, generator.n_classes)  # type: ignore[arg-type]
    if not len(labels):
        raise ValueError("labels must hold at least one label, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(len(labels), generator.dim_z, generator=rng).to(parameter)  # type: ignore[call-overload]
    labels = labels.to(parameter.device)
    training = generator.training
    generator.eval()
    try:
        images = []
        for z_batch, label_batch in zip(z.split(batch_size), labels.split(batch_size), strict=True):
            images.append(generator(z_batch, label_batch))
            if on_batch is not None:
                on_batch(len(label_batch))
    finally:
        generator.train(training)
    return torch.cat(images)
