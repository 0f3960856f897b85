"""Grids of images and curves, as PNG files in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import torch
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """uint8 RGB (n, 3, h, w) of images (n, 1 or 3, h, w) in [-1, 1]."""
    return ((images.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def grid_png(images: Tensor, columns: int, *, scale: int = 2, gap: int = 4) -> bytes:
    """A PNG of images (n, 1 or 3, h, w) in [-1, 1], row by row, each pixel ``scale`` pixels wide, on grey."""
    pixels = to_pixels(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, channels, height, width = pixels.shape
    rows = -(-n // columns)
    grid = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 128, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return png_bytes(grid)


def png_bytes(pixels: Tensor) -> bytes:
    """A PNG of one uint8 RGB image (3, h, w)."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def curves_png(
    losses: Mapping[str, Sequence[float]],
    scores: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    score_name: str,
    floors: Mapping[str, float] | None = None,
) -> bytes:
    """A PNG of losses, one value a step from step 1, beside scores, each steps and values.

    Args:
        losses: by name.
        scores: by name.
        score_name: the label of the scores' axis.
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
    for name, value in (floors or {}).items():
        right.axhline(value, color="grey", linestyle="--", label=name)
    right.set(xlabel="step", ylabel=score_name, ylim=(0, None))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
