"""``fastgan evaluate``, resumed statistics and the floor."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data.archives import ImageArray, register_opener
from fastgan.metrics import FeatureStats, frechet_distance, kernel_distance, precision_recall
from tests.cli.commands import assert_one_line_error, run
from tests.data.resizing import resize_array

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8), RNG.integers(80, 256, (50, 6, 6, 3), dtype=np.uint8)


class Pooled(torch.nn.Module):
    """12 features of images of any size, and class scores of them."""

    calls = 0

    def forward(self, images):
        Pooled.calls += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    """A network that costs nothing in the place of EfficientNet's."""
    from fastgan.metrics import Backbone

    def load(name, **options):
        assert name in ("inception", "efficientnet_lite0")
        return Backbone(Pooled(), name="efficientnet_lite0", dim=12, input_size=8, head=lambda features: 9 * features)

    monkeypatch.setattr("fastgan.metrics.options.load_backbone", load)
    monkeypatch.setattr("fastgan.metrics.options.local_weights", lambda: "at hand")
    monkeypatch.setenv("FASTGAN_OFFLINE", "1")
    Pooled.calls = 0


@pytest.fixture
def sets(tmp_path):
    """The fake images as a folder, the real ones as an npz."""
    (tmp_path / "fake").mkdir()
    for i, image in enumerate(FAKE):
        Image.fromarray(image).save(tmp_path / "fake" / f"{i:02}.png")
    np.savez(tmp_path / "real.npz", images=REAL)
    return tmp_path / "fake", tmp_path / "real.npz"


@pytest.fixture
def features():
    def of(images):
        pixels = torch.stack([resize_array(image, 8, "clean") for image in images])
        return Pooled()(pixels / 255)

    return of(REAL), of(FAKE)


def test_several_metrics_in_one_pass(sets, features, tmp_path):
    real, fake = features
    Pooled.calls = 0
    options = ("--metrics", "all", "--subset-size", 20, "--subsets", 5, "-k", 3, "--splits", 2)
    result = run("evaluate", *sets, *options, "--json", "--plot", tmp_path / "bias.png")
    found = json.loads(result.stdout)
    assert Pooled.calls == 90
    assert found["fid"] == pytest.approx(frechet_distance(*(FeatureStats().update(x) for x in (fake, real))), rel=1e-5)
    assert found["kid"]["mean"] == pytest.approx(kernel_distance(real, fake, subsets=5, subset_size=20).mean, rel=1e-4)
    assert found["prdc"]["recall"] == pytest.approx(precision_recall(real, fake, k=3).recall)
    assert found["is"]["mean"] > 1
    assert found["fid_infinity"]["standard_error"] > 0
    assert found["bias_curve"]["sizes"] == [50]
    assert (found["n"], found["metric"], found["precision"]) == ([50, 40], "FD (efficientnet_lite0)", "fp32")
    assert Image.open(tmp_path / "bias.png").size[0] > 300

    lines = run("evaluate", *sets, *options).stdout.splitlines()
    assert (
        lines[0] == f"{sets[0]}: N = 50, backbone efficientnet_lite0 (12 features), protocol clean-fid, precision fp32"
    )
    assert lines[1].startswith(f"{sets[1]}: N = 40, ")
    assert lines[2].startswith("KD (efficientnet_lite0):  ")
    assert lines[3].startswith("class score (efficientnet_lite0):  ")
    assert lines[4].startswith("precision ")
    assert lines[5].startswith("FD-infinity (efficientnet_lite0):  ")
    assert float(lines[6].removeprefix("FD (efficientnet_lite0):  ")) == pytest.approx(found["fid"])


def test_many_images_are_worth_a_compilation(sets, monkeypatch):
    compiled = []
    monkeypatch.setattr("fastgan.metrics.Backbone.compile", lambda self: compiled.append(self.name))
    for threshold, expected in ((91, 0), (90, 1)):  # 50 and 40 images
        monkeypatch.setattr("fastgan.metrics.backbones.base._COMPILE_FROM", threshold)
        run("fid", *sets)
        assert len(compiled) == expected


def test_the_floor(sets, features, tmp_path):
    with zipfile.ZipFile(tmp_path / "split.zip", "w") as file:
        for image in sets[0].iterdir():
            file.write(image, image.name)
    split = tmp_path / "split.zip"
    expected = frechet_distance(*(FeatureStats().update(x) for x in features))
    for command in ("fid", "evaluate"):
        found = json.loads(run(command, *sets, "--floor", split, "--json").stdout)
        assert found["floor"] == pytest.approx(expected, rel=1e-5)
        assert (found["floor_path"], found["floor_n"]) == (str(split), 50)
        assert "floor, the last two sets' FD (efficientnet_lite0):  " in run(command, *sets, "--floor", split).stdout


def test_a_source_that_knows_its_reference_and_a_second_split(sets, features, monkeypatch):
    real, fake = features
    monkeypatch.setattr("fastgan.data.archives._openers", [])

    def opener(path, skip_bad):
        if path != sets[0]:
            return None
        source = ImageArray(FAKE, label="a run")
        source.reference = sets[1]
        source.second_split = ImageArray(FAKE[:9], label="another split")
        return source

    register_opener(opener)
    found = json.loads(run("evaluate", sets[0], "--metrics", "fid", "--json").stdout)
    assert found["paths"] == ["a run", str(sets[1])]
    assert found["floor"] == pytest.approx(frechet_distance(*(FeatureStats().update(x) for x in (real, fake[:9]))))
    assert (found["floor_path"], found["floor_n"]) == ("another split", 9)
    for options in (("--metrics", "kid"), (sets[1], "--metrics", "fid")):  # no distance to judge by it, or not its data
        assert "floor" not in json.loads(run("evaluate", sets[0], *options, "--json").stdout)


def test_what_evaluate_refuses(sets, tmp_path):
    fake, real = sets
    run("stats", "save", real, tmp_path / "stats.npz")
    assert run("evaluate", fake, tmp_path / "stats.npz", "--metrics", "fid,fid-infinity").exit_code == 0
    np.savez(tmp_path / "few.npz", images=REAL[:23])
    np.savez(tmp_path / "one.npz", images=REAL[:1])
    computed = Pooled.calls
    for arguments, part in (
        ((fake, real, "--metrics", "fid,lpips"), "--metrics must be of fid, fid-infinity, kid, is, prdc, got lpips"),
        ((fake, tmp_path / "stats.npz"), "--metrics kid,prdc needs images on both sides"),
        ((tmp_path / "stats.npz", real), "must hold statistics (mu and sigma) or images"),
        ((fake,), "names no reference to compare it with"),
        ((fake, real, "--metrics", "prdc", "-k", "0"), "-k must be at least 1"),
        ((fake, real, "--plot", tmp_path / "none" / "a.png"), "its folder does not exist"),
        ((fake, real, "--plot", tmp_path / "a.xyz"), "a.xyz: its name must end in one of "),
        ((fake, tmp_path / "nothing"), "no such folder"),
        ((fake, real, "--metrics", "is", "--splits", 51), "is needs at least 51 images, "),
        ((fake, real, "-k", 45), f"prdc needs at least 46 images, {real} holds 40"),
        ((tmp_path / "few.npz", real, "--metrics", "fid-infinity"), "fid-infinity needs at least 24 images, "),
        ((fake, tmp_path / "one.npz"), "kid needs at least 2 images, "),
        ((fake, tmp_path / "one.npz", "--metrics", "fid"), "at least 2 images for a covariance, it holds 1"),
    ):
        assert_one_line_error(run("evaluate", *arguments, "--backbone", "efficientnet_lite0"), part)
    assert Pooled.calls == computed
    assert run("evaluate", fake, "--metrics", "is").stdout.splitlines()[-1].startswith("class score")


def test_features_that_are_not_finite(sets, monkeypatch, tmp_path):
    monkeypatch.setattr(Pooled, "forward", lambda self, images: images.flatten(1)[:, :12] / 0)
    for arguments in (("fid", *sets), ("stats", "save", sets[0], tmp_path / "a.npz")):
        result = run(*arguments, "--backbone", "efficientnet_lite0")
        assert_one_line_error(result, "features must be finite: row 0")
    assert not (tmp_path / "a.npz").exists()


def test_statistics_go_on_after_an_interruption(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.metrics.features._SAVE_EVERY", 0.0)
    fake, _ = sets
    (fake / "05bad.png").write_bytes(b"")
    (fake / "25bad.png").write_bytes(b"")
    options = ("--skip-bad", "--batch-size", 4, "--num-workers", 0, "--checkpoint", tmp_path / "unfinished")
    expected = run("stats", "save", fake, tmp_path / "whole.npz", *options[:5]).stdout
    with monkeypatch.context() as patch:
        interrupt(patch, after=17)
        assert run("stats", "save", fake, tmp_path / "a.npz", *options).exit_code != 0
    assert not (tmp_path / "a.npz").exists()
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    Pooled.calls = 0
    resumed = run("stats", "save", fake, tmp_path / "a.npz", *options)
    assert Pooled.calls == 50 - 20
    assert resumed.stdout == expected.replace("whole.npz", "a.npz")
    assert "2 unreadable left out" in resumed.stdout
    whole, again = (FeatureStats.load(tmp_path / name) for name in ("whole.npz", "a.npz"))
    torch.testing.assert_close(again.cov, whole.cov, rtol=1e-12, atol=1e-15)
    assert not list((tmp_path / "unfinished").iterdir())


def test_an_evaluation_goes_on_in_its_second_set(sets, tmp_path, monkeypatch):
    """The features too, and the finished first set is not read again."""
    options = ("--metrics", "all", "--subset-size", 20, "--splits", 2, "--json")
    expected = run("evaluate", *sets, *options).stdout
    monkeypatch.setattr("fastgan.metrics.features._SAVE_EVERY", 0.0)
    options = (*options, "--batch-size", 8, "--checkpoint", tmp_path / "unfinished")
    with monkeypatch.context() as patch:
        interrupt(patch, after=50 + 16)
        assert run("evaluate", *sets, *options).exit_code != 0
    assert len(list((tmp_path / "unfinished").iterdir())) == 2
    Pooled.calls = 0
    found, expected = (json.loads(text) for text in (run("evaluate", *sets, *options).stdout, expected))
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float | dict) else value)
    assert Pooled.calls == 40 - 16
    assert not list((tmp_path / "unfinished").iterdir())


def interrupt(patch, *, after):
    """Ctrl-C once the network has seen ``after`` images."""
    forward = Pooled.forward
    Pooled.calls = 0

    def interrupted(self, images):
        if Pooled.calls >= after:
            raise KeyboardInterrupt
        return forward(self, images)

    patch.setattr(Pooled, "forward", interrupted)
