"""The images of a run: what follows from them, and that they are the same when it is resumed."""

import json

import pytest

from fastgan._checks import InputError
from tests.training.tiny_runs import folder_of_images, resume, start, tiny

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("quick_features")


def test_data_may_move_but_not_change(tmp_path, monkeypatch):
    folder_of_images(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    recipe = tiny("dcgan", "data.source=d", "held_out=0.25")
    start(recipe, tmp_path / "run").train()
    monkeypatch.chdir("/")
    assert resume(tmp_path / "run").trainer.step == 2
    (tmp_path / "d").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"/d, the data of .*, does not exist: give the new place"):
        resume(tmp_path / "run")
    moved = f"data.source={tmp_path / 'moved'}"
    again = resume(tmp_path / "run", overrides=[moved])
    assert resume(tmp_path / "run").recipe == again.recipe  # the new place is kept
    (tmp_path / "moved/c0/0.png").write_bytes((tmp_path / "moved/c1/1.png").read_bytes())
    (tmp_path / "moved/c2/2.png").rename(tmp_path / "moved/c2/99.png")
    with pytest.raises(
        InputError, match=r"1 file is gone: c2/2.png; 1 file is new: c2/99.png; 1 file is changed: c0/0"
    ):
        resume(tmp_path / "run")
    with pytest.raises(InputError, match="data.source is .* in the run, 'digits' was asked for"):
        resume(tmp_path / "run", overrides=["data.source=digits"])


def test_flips_follow_from_the_data(tmp_path):
    assert start(tiny("dcgan"), tmp_path / "digits").trainer.loader.flip is False
    assert "flip: false" in (tmp_path / "digits" / "config.yaml").read_text()
    source = f"data.source={folder_of_images(tmp_path / 'd')}"
    run = start(tiny("dcgan", source, "held_out=0.25"), tmp_path / "color")
    assert run.trainer.loader.flip is True
    run.train()
    assert resume(tmp_path / "color", recipe=tiny("dcgan", source, "held_out=0.25")).trainer.loader.flip is True
    gray = start(tiny("dcgan", source, "held_out=0.25", "channels=1"), tmp_path / "gray")
    assert gray.trainer.loader.flip is False


def sketch_folders(folder, paired=True, n=12):
    folder_of_images(folder / "images", n)
    for path in sorted((folder / "images").rglob("*.png")):
        drawn = folder / "sketches" / path.parent.name / (path.name if paired else f"drawn-{path.name}")
        drawn.parent.mkdir(parents=True, exist_ok=True)
        drawn.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(("kind", "sees"), [("paired", True), ("unpaired", False), ("edges", True)])
def test_the_data_decides_the_source_of_sketches(kind, sees, tmp_path):
    source = sketch_folders(tmp_path / "d", kind == "paired")
    source = source / "images" if kind == "edges" else source
    notes = []
    run = start(tiny("sketch-cgan", f"data.source={source}", "held_out=0.25"), tmp_path / "run", notes)
    assert run.recipe.data.sketches == kind
    assert run.trainer.gan.sees_sketch is sees
    assert ("which the discriminator sees" in " ".join(notes)) is sees
    run.train()
    assert resume(tmp_path / "run").recipe == run.recipe


def test_a_pixel_loss_ties_images_to_their_sketches(tmp_path):
    source = f"data.source={sketch_folders(tmp_path / 'd')}"
    run = start(tiny("sketch-cgan", source, "held_out=0.25", "pixel_weight=100"), tmp_path / "run")
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < row.get("loss/generator/pixel", 0) <= 200 for row in rows)
    with pytest.raises(InputError, match="pixel_weight must be 0 for unpaired sketches"):
        start(tiny("sketch-cgan", source, "held_out=0.25", "pixel_weight=1", "sketches=unpaired"), tmp_path / "other")
    with pytest.raises(InputError, match="pixel_weight must be 0 for a generator from noise"):
        start(tiny("dcgan", "pixel_weight=1"), tmp_path / "other")


def test_findings_are_reported_and_kept(tmp_path):
    folder_of_images(tmp_path / "d")
    notes = []
    start(tiny("sagan", f"data.source={tmp_path / 'd'}", "held_out=0.25"), tmp_path / "run", notes)
    assert notes[0] == "12 images 20x20 RGB, 3 classes: c0 4, c1 4, c2 4"
    assert notes[1] == "9 to train on, 3 held out, at 16x16; mirrored at random"
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert kept["found"] == notes[0]
    assert kept["class_names"] == ["c0", "c1", "c2"]
    assert (kept["train"], kept["held_out"]) == ([3] * 3, [1] * 3)


@pytest.mark.parametrize("name", ["acgan", "sagan", "csagan-w", "wgan-gp-ac"])
def test_a_conditional_recipe_on_one_class(name, tmp_path):
    folder_of_images(tmp_path / "d")
    (tmp_path / "d" / "cover.png").write_bytes((tmp_path / "d/c0/0.png").read_bytes())
    with pytest.raises(InputError, match=f"recipe {name} needs at least two classes.*cover.png lies beside"):
        start(tiny(name, f"data.source={tmp_path / 'd'}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_resolution_follows_from_the_data(tmp_path):
    source = f"data.source={folder_of_images(tmp_path / 'd')}"
    run = start(tiny("dcgan", source, "resolution=auto"), tmp_path / "run")
    assert (run.recipe.model.resolution, run.generator.resolution) == (32, 32)
    assert "resolution: 32" in (tmp_path / "run" / "config.yaml").read_text()
