"""``fastgan train``, ``recipes`` and ``sample``."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.models import DCGANGenerator, SketchGenerator
from fastgan.recipes import available

pytest.importorskip("sklearn")
SMALL = ("resolution=16", "generator_width=8", "discriminator_width=8", "batch_size=4", "score_sizes=[2]")


def fastgan(*arguments, status=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def test_recipes_are_listed_with_a_line_each():
    lines = fastgan("recipes").splitlines()
    assert [line.split()[0] for line in lines] == available()
    assert all(len(line.split()) > 3 for line in lines)


def test_train_resume_and_sample(tmp_path):
    out = tmp_path / "run"
    said = fastgan("train", "--recipe", "acgan", "--data", "digits", "--out", out, "--quiet", "steps=1", *SMALL)
    assert f"{out}: 1 steps done" in said
    assert f"{out}: 2 steps done" in fastgan("train", "--resume", out, "--quiet", "steps=2")
    assert f"{out} is finished, 2 of 2 steps are done: steps=4" in fastgan("train", "--resume", out, "--quiet")
    refused = fastgan("train", "--resume", out, "--quiet", "batch_size=8", status=2)
    assert "train.batch_size is 4 in the run, 8 was asked for" in refused
    for options in ((), ("--class", 3), ("--truncation", 0.5), ("--interpolate", "--columns", 5)):
        fastgan("sample", out, "--out", tmp_path / "grid.png", *options)
        with Image.open(tmp_path / "grid.png") as image:
            columns = 5 if "--interpolate" in options else 8
            rows = 8 if "--class" in options else 10
            names = 0 if "--class" in options else 14  # the width of a digit
            assert abs(image.width - names - columns * 68 - 4) <= 4
            assert image.height == rows * 68 + 4
    fastgan("sample", out, "--out", tmp_path / "many", "-n", 12)
    assert sorted(p.name for p in (tmp_path / "many").iterdir())[-1] == "000011.png"
    (tmp_path / "many" / "notes.txt").write_text("mine")
    refused = fastgan("sample", out, "--out", tmp_path / "many", "-n", 4, status=2)
    assert "must be empty or new; --overwrite removes the samples" in " ".join(refused.split())
    fastgan("sample", out, "--out", tmp_path / "many", "-n", 4, "--overwrite")
    left = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert left == ["000000.png", "000001.png", "000002.png", "000003.png", "notes.txt"]
    Image.new("RGB", (8, 8)).save(tmp_path / "many" / "mine.png")
    refused = fastgan("sample", out, "--out", tmp_path / "many", "-n", 4, "--overwrite", status=2)
    assert "must hold no images but samples, it holds mine.png" in " ".join(refused.split())
    assert len(list((tmp_path / "many").iterdir())) == 6
    fastgan("sample", out, "--out", tmp_path / "by", "-n", 11, "--by-class")
    assert sorted(str(p.relative_to(tmp_path / "by")) for p in (tmp_path / "by").rglob("*.png")) == sorted(
        f"{i % 10}/{i:06d}.png" for i in range(11)
    )
    fastgan("sample", out, "--out", tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "JPEG"
    fastgan("sample", out / "generator", "--out", tmp_path / "pretrained.png")
    assert (tmp_path / "pretrained.png").stat().st_size > 1000


def test_sketches_for_a_saved_generator(tmp_path):
    SketchGenerator(2, resolution=16, image_channels=1, width=8).save_pretrained(tmp_path / "g")
    for i in range(3):
        (tmp_path / "s").mkdir(exist_ok=True)
        Image.new("L", (20, 20), 80 * i).save(tmp_path / "s" / f"{i}.png")
    fastgan("sample", tmp_path / "g", "--sketches", tmp_path / "s", "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (8 * 68 + 4, 2 * 68 + 4)
    assert "--sketches must be given" in fastgan("sample", tmp_path / "g", "--out", tmp_path / "x.png", status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--recipe", "sagan"), "give either --out for a new run, or --resume"),
        (("train", "--out", "run"), "--recipe must be given for a new run"),
        (("train", "--recipe", "sgan", "--out", "run"), "recipe must be one of"),
        (("train", "--recipe", "sagan", "--out", "run", "stps=3"), "no key 'stps' in a recipe; did you mean 'steps'?"),
        (("train", "--recipe", "sagan", "--out", "run", "--data", "nowhere"), "nowhere does not exist"),
        (("train", "--recipe", "sagan", "--out", "run", "--device", "gpu7"), "--device gpu7 cannot be used"),
        (("train", "--resume", "nowhere"), "nowhere holds no run"),
        (("train", "--resume", "run", "--overwrite"), "--overwrite is for a new run in --out"),
        (("sample", "nowhere", "--out", "x.png"), "nowhere holds neither a run"),
        (("sample", "g", "--out", "x.png", "--class", 3), "--class must be in [0, 3), got 3"),
        (("sample", "g", "--out", "x.png", "--class", "cat"), "--class must be in [0, 3), got cat"),
        (("sample", "g", "--out", "x.svg"), "--out must end in .png, .jpg, .jpeg, .webp, got x.svg"),
        (("sample", "g", "--out", "g/config.json/x.png"), "g/config.json cannot be written to"),
        (("sample", "g", "--out", "x", "--by-class"), "--by-class needs -n"),
        (("sample", "g", "--out", "x.png", "--truncation", -1), "truncation must be positive"),
        (("sample", "g", "--out", "x", "--interpolate", "-n", 3), "--interpolate makes a grid"),
        (("sample", "g", "--out", "x", "--sketches", "s"), "--sketches must not be given"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DCGANGenerator(3, resolution=16, width=8).save_pretrained("g")
    said = fastgan(*arguments, status=2)
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_a_recipe_is_printed_with_comments_and_can_be_used(tmp_path):
    text = fastgan("recipes", "sketch-cgan")
    assert "  # Weight of" not in text
    assert "  # weight of the mean absolute difference between generated images and those that" in text
    (tmp_path / "mine.yaml").write_text(text)
    assert fastgan("recipes", tmp_path / "mine.yaml") == text
    assert "recipe must be one of" in " ".join(fastgan("recipes", "nothing", status=2).split())


def test_a_dry_run_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fastgan("train", "--recipe", "acgan", "--dry-run", "--quiet", "steps=500", *SMALL)
    assert "500 steps take about" in said
    assert not list(tmp_path.iterdir())
    refused = fastgan("train", "--resume", "run", "--dry-run", status=2)
    assert "--dry-run is for a new run" in refused


@pytest.mark.parametrize("name", ["2024", "a: b #1", "[x", "null"])
def test_a_data_folder_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    said = fastgan("train", "--recipe", "dcgan", "--data", name, "--dry-run", "steps=1", *SMALL)
    assert "6 images 16x16 RGB" in said


def test_broken_images_init_and_overwrite(tmp_path):
    for i in range(12):
        (tmp_path / "d" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / "d" / f"{i % 2}" / f"{i}.png")
    (tmp_path / "d" / "0" / "broken.png").write_bytes(b"no picture")
    command = ("train", "--recipe", "dcgan", "--data", tmp_path / "d", "--quiet", "steps=1", *SMALL, "--out")
    assert "broken.png is not a readable image" in fastgan(*command, tmp_path / "a", status=2)
    said = fastgan(*command, tmp_path / "a", "--skip-bad")
    assert "12 images 16x16 RGB, 2 classes: 0 6, 1 6" in said
    assert "1 unreadable" in said
    assert "add --overwrite" in fastgan(*command, tmp_path / "a", "--skip-bad", status=2)
    fastgan(*command, tmp_path / "a", "--skip-bad", "--overwrite")
    assert "tensors of the generator are those of" in fastgan(
        *command, tmp_path / "b", "--skip-bad", "--init", tmp_path / "a"
    )
