"""``fastgan evaluate --html``: one self-contained page of an evaluation, its pictures within it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from fastgan._files import write_text
from fastgan.data.image_sources import ImageSource
from fastgan.metrics._fid_infinity import draw_bias
from fastgan.metrics.evaluate import Evaluation
from fastgan.metrics.prdc import nearest

_GRID, _COLUMNS, _PIXELS = 48, 12, 64
_NEIGHBOURS = 12
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:left}"
    "td+td{white-space:nowrap}"
    "img{max-width:100%;image-rendering:pixelated}"
    ".bar{background:#4878a8;height:1em;min-width:1px}.scale{width:30em}"
)


def write_report(
    result: Evaluation, path: Path, *, fake: ImageSource | None = None, real: ImageSource | None = None
) -> None:
    """Write the page: the sets with N and protocol, every value, the distance within each class, the bias curve,
    grids of both sets, and some generated images above their nearest real ones.

    Args:
        result: its features give the neighbors, if it keeps them of both sides.
        path: of the .html file.
        fake, real: the images; None leaves out the pictures of a side.

    Raises:
        InputError: an image cannot be read.
    """
    parts = ["<h2>Sets and values</h2><table>"]
    for line in result.lines():
        name, _, value = line.partition(":  ")
        parts.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>")
    parts.append("</table>")
    for number, found in result.values.items():
        if classes := found.details.get("classes"):
            parts += [f"<h2>{html.escape(number)} of each class</h2>", _bars(classes)]
    if result.curve is not None:
        picture = BytesIO()
        figure = draw_bias(result.curve, label=result.distance_name, floor=result.floor, limit=result.limit)
        figure.savefig(picture, format="png")
        parts += ["<h2>Bias over the number of images</h2>", _image(picture.getvalue(), "bias curve")]
    for title, source in (("Generated images", fake), ("Real images", real)):
        if source is not None:
            chosen = [source.read(i) for i in _spread(len(source), _GRID)]
            parts += [f"<h2>{title}</h2>", _image(_grid(chosen), title.lower())]
    measured = (result.result.measured, result.reference)
    if fake is not None and real is not None and not any(side is None or side.skipped for side in measured):
        of_fake, of_real = (None if side is None else side.features for side in measured)
        if of_fake is not None and of_real is not None:
            indices = _spread(len(fake), _NEIGHBOURS)
            _, neighbors = nearest(of_fake[torch.tensor(indices)].float(), of_real.float())
            pairs = [fake.read(i) for i in indices] + [real.read(i) for i in neighbors.tolist()]
            parts += ["<h2>Generated images above their nearest real ones</h2>", _image(_grid(pairs), "neighbors")]
    head = f'<meta charset="utf-8"><title>fastgan evaluate</title><style>{_STYLE}</style>'
    body = f"<h1>{html.escape(result.sides[0].label)}</h1>{''.join(parts)}"
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
    write_text(path, page.encode("utf-8", "replace").decode())


def _bars(values: Mapping[str, float]) -> str:
    """A table with a bar per class, the largest value first."""
    largest = max(values.values()) or 1.0
    rows = [
        f'<tr><td>{html.escape(name)}</td><td>{value:.4g}</td><td class="scale">'
        f'<div class="bar" style="width:{100 * value / largest:.1f}%"></div></td></tr>'
        for name, value in sorted(values.items(), key=lambda item: -item[1])
    ]
    return f"<table>{''.join(rows)}</table>"


def _spread(n: int, count: int) -> list[int]:
    """``count`` indices of n, evenly spread; all of them if there are fewer."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, count))})


def _grid(images: Sequence[np.ndarray]) -> bytes:
    """A PNG of images, each fitted into a square."""
    from PIL import Image, ImageOps

    rows = -(-len(images) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (_PIXELS + 2), rows * (_PIXELS + 2)), "white")
    for i, image in enumerate(images):
        square = ImageOps.pad(Image.fromarray(image.round().astype(np.uint8)), (_PIXELS, _PIXELS), color="white")
        sheet.paste(square, ((i % _COLUMNS) * (_PIXELS + 2), (i // _COLUMNS) * (_PIXELS + 2)))
    buffer = BytesIO()
    sheet.save(buffer, "png")
    return buffer.getvalue()


def _image(png: bytes, what: str) -> str:
    return f'<img alt="{what}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
