"""Grids of images and curves, as files in memory."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
import torch
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """uint8 RGB (n, 3, h, w) of images (n, 1 or 3, h, w) in [-1, 1]."""
    return ((images.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Formats of pictures by the extension of their file."""


def grid_picture(
    images: Tensor, columns: int, *, sketches: Tensor | None = None, row_names: Sequence[str] = (), format: str = "PNG"
) -> bytes:
    """Encode images (n, 1 or 3, h, w) in [-1, 1], row by row on gray; small ones are enlarged to about 64 pixels.

    Args:
        images: those of the first row, then of the second, and so on.
        columns: images per row.
        sketches: one per image; each image stands to the right of its sketch, and both count as columns.
        row_names: written to the left of the rows; none for none.
        format: one of :data:`FORMATS`.
    """
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.utils import make_grid

    if sketches is not None:
        images = torch.stack([sketches.to(images.device).expand_as(images), images], 1).flatten(0, 1)
    scale = max(1, 64 // images.shape[-1])
    pixels = to_pixels(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(pixels, nrow=columns, padding=4, pad_value=128)
    if not row_names:
        return encoded(grid, format)
    font = ImageFont.load_default()
    margin = int(max(font.getlength(name) for name in row_names)) + 8
    canvas = Image.new("RGB", (grid.shape[2] + margin, grid.shape[1]), (128, 128, 128))
    canvas.paste(Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (margin, 0))
    drawing, height = ImageDraw.Draw(canvas), pixels.shape[2] + 4
    for row, name in enumerate(row_names):
        drawing.text((4, 4 + row * height + height // 2 - 8), name, fill=(0, 0, 0), font=font)
    return encoded(torch.from_numpy(np.array(canvas)).permute(2, 0, 1), format)


def encoded(pixels: Tensor, format: str = "PNG") -> bytes:
    """Encode one uint8 RGB image (3, h, w); JPEG with quality 95."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, format=format, quality=95)
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
        floors: values of real images, drawn as dashed lines in the colors of the scores, in their order.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in losses.items():
        left.plot(range(1, len(values) + 1), values, label=name, linewidth=0.8)
    left.set(xlabel="step", ylabel="loss", title="Losses")
    for i, (name, (steps, values)) in enumerate(scores.items()):
        right.plot(steps, values, marker="o", markersize=4, label=name, color=f"C{i}")
    for i, (name, value) in enumerate(floors.items()):
        right.axhline(value, color=f"C{i}", linestyle="--", label=f"{name}: {value:.3g}")
    right.set(xlabel="step", ylabel="\n".join(textwrap.wrap(score_name, 40)), ylim=(0, None), title="Scores")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
