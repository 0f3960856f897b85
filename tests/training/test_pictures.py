"""Grids with the names of their rows, and curves."""

import io

import pytest
import torch
from PIL import Image

from fastgan.training.pictures import curves_png, grid_picture


def opened(content):
    return Image.open(io.BytesIO(content))


def test_rows_bear_their_names():
    images = torch.ones(4, 1, 64, 64)
    plain, named = opened(grid_picture(images, 2)), opened(grid_picture(images, 2, row_names=["cat", "long name"]))
    assert plain.size == (140, 140)
    margin = named.width - plain.width
    assert 20 < margin < 140
    assert named.crop((margin, 0, named.width, named.height)).tobytes() == plain.tobytes()
    for top in (0, 68):  # each row has ink of its own
        strip = named.crop((0, top, margin, top + 68)).convert("L")
        darkest, lightest = strip.getextrema()
        assert darkest < 60
        assert lightest == 128


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_formats(name):
    assert opened(grid_picture(torch.zeros(1, 3, 16, 16), 1, format=name)).format == name


def test_floors_of_each_size_are_drawn_apart(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    draw = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **how: (drawn.append((y, how)), draw(self, y, **how))[1])
    scores = {"N = 8": ([0, 1], [3.0, 2.0]), "N = 64": ([0, 1], [2.0, 1.0])}
    content = curves_png({"d": [1.0, 2.0]}, scores, score_name="FID", floors={"real, N = 8": 0.5, "real, N = 64": 0.25})
    assert [(y, how["color"]) for y, how in drawn] == [(0.5, "C0"), (0.25, "C1")]
    assert [how["label"] for _, how in drawn] == ["real, N = 8: 0.5", "real, N = 64: 0.25"]
    assert opened(content).size == (1100, 450)
