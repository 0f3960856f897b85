"""The demonstration writes what it says, from a few steps and images."""

import json
import math

import pytest
import torch

import fastgan.demo
from fastgan._checks import InputError
from fastgan.demo import distances_within_classes, run_demo

SCORED = 20


@pytest.mark.slow
def test_a_short_run(tmp_path):
    for module in ("sklearn", "scipy", "matplotlib", "rich", "PIL"):
        pytest.importorskip(module)
    out = tmp_path / "nested" / "out"
    report = run_demo(out, steps=3, seed=4, score_images=SCORED, sqrtm_dim=32, timing_seconds=0)
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.png", "samples.png"]
    check_samples_are_a_row_a_class(out / "samples.png")
    check_the_report_is_a_picture(out / "report.png")
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    check_report(report)


def check_samples_are_a_row_a_class(path):
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        cell = 2 * 32 + 4
        assert image.size == (10 * cell + 4, 10 * cell + 4)


def check_the_report_is_a_picture(path):
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        assert image.size == (1300, 800)
        assert len(image.convert("L").getcolors()) > 10


def check_report(report):
    assert report["recipe"]["train"]["seed"] == 4
    assert report["recipe"]["train"]["steps"] == 3
    assert report["versions"]["torch"] == torch.__version__
    scores = report["frechet_distance"]
    assert scores["n"] == SCORED
    assert 0 < scores["real"] < scores["before"]
    assert math.isfinite(scores["after"])
    assert len(report["losses"]["generator"]) == 3
    assert list(scores["by_step"]) == [0, 1, 2, 3]
    assert scores["by_step"][0] == scores["before"]
    assert scores["by_step"][3] == scores["after"]
    quality = report["quality"]
    assert quality["accuracy_held_out"] > 0.97
    assert quality["accuracy_generated"] == pytest.approx(sum(quality["accuracy_per_class"]) / 10)
    assert quality["variety"] > 0
    assert len(report["timings"]) == 6
    for usual, own in zip(report["timings"][::2], report["timings"][1::2], strict=True):
        assert usual["workload"] == own["workload"]
        assert usual["implementation"] != own["implementation"] == "fastgan"
        assert 0 < own["low"] <= own["median"] <= own["high"]
    assert report["timings"][0]["peak_memory"] > report["timings"][1]["peak_memory"]


def test_distances_within_classes():
    images = torch.tensor([0.0, 3.0, 1.0]).view(3, 1, 1, 1)
    spreads = distances_within_classes(images, torch.tensor([0, 0, 1]), 2)
    assert spreads[0] == 3
    assert spreads[1].isnan()


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        run_demo(tmp_path / "out", steps=0)
    with pytest.raises(ValueError, match="score_images must be from 10 to 599, got 5"):
        run_demo(tmp_path / "out", score_images=5)
    monkeypatch.setitem(fastgan.demo.REQUIRED, "no_such_module_anywhere", "a-package")
    with pytest.raises(InputError, match=r"the demo needs a-package: pip install 'fastgan\[demo\]'"):
        run_demo(tmp_path / "out")
    assert not list(tmp_path.iterdir())
