"""Grids of images and curves, as PNG files in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import torch
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """uint8 RGB (n, 3, h, w) of images (n, 1 or 3, h, w) in [-1, 1]."""
    return ((images.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def grid_png(images: Tensor, columns: int, *, sketches: Tensor | None = None) -> bytes:
    """PNG of images (n, 1 or 3, h, w) in [-1, 1], row by row on gray; small ones are enlarged to about 64 pixels.

    With ``sketches``, each image stands to the right of its sketch, and both count as columns.
    """
    from torchvision.utils import make_grid

    if sketches is not None:
        images = torch.stack([sketches.to(images.device).expand_as(images), images], 1).flatten(0, 1)
    scale = max(1, 64 // images.shape[-1])
    pixels = to_pixels(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return png_bytes(make_grid(pixels, nrow=columns, padding=4, pad_value=128))


def png_bytes(pixels: Tensor) -> bytes:
    """PNG of one uint8 RGB image (3, h, w)."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def curves_png(
    losses: Mapping[str, Sequence[float]],
    scores: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    score_name: str,
    floors: Mapping[str, float],
) -> bytes:
    """PNG of two plots, losses and scores over the steps.

    Args:
        losses: by name, one value per step from step 1.
        scores: by name, each steps and values.
        score_name: label of the scores' axis.
        floors: values of real images, drawn as dashed lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in losses.items():
        left.plot(range(1, len(values) + 1), values, label=name, linewidth=0.8)
    left.set(xlabel="step", ylabel="loss", title="Losses")
    for name, (steps, values) in scores.items():
        right.plot(steps, values, marker="o", label=name)
    for name, value in floors.items():
        right.axhline(value, color="grey", linestyle="--", label=name)
    right.set(xlabel="step", ylabel=score_name, ylim=(0, None))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
