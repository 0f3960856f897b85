"""Beside pytorch-fid and clean-fid: the same folders, the same numbers; each other's files."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.metrics import Backbone, FeatureStats, folder_stats, frechet_distance
from fastgan.metrics.backbones import inception
from fastgan.metrics.backbones.inception import InceptionV3
from tests.metrics.random_weights import randomize

DIMS = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 16 and 13 PNGs of 24 x 24; the second is brighter."""
    rng = np.random.default_rng(0)
    roots = []
    for name, n, low in (("a", 16, 0), ("b", 13, 100)):
        root = tmp_path_factory.mktemp(name)
        for i in range(n):
            Image.fromarray(rng.integers(low, 256, (24, 24, 3), dtype=np.uint8)).save(root / f"{i}.png")
        roots.append(root)
    return roots


@pytest.fixture
def random_weights(tmp_path, monkeypatch):
    """Random Inception weights that both take for the published ones."""
    pytorch_fid = pytest.importorskip("pytorch_fid.inception")
    network = randomize(InceptionV3())
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *args, **kwargs: network.state_dict())
    monkeypatch.setattr(inception, "HASH_PREFIX", "")
    monkeypatch.setenv(inception.ENVIRONMENT, str(path))


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_the_same_command_prints_pytorch_fids_number(folders, random_weights, tmp_path, capsys, monkeypatch):
    score = pytest.importorskip("pytorch_fid.fid_score")
    arguments = ["--dims", str(DIMS), "--num-workers", "0", "--device", "cpu", "--batch-size", "40"]
    monkeypatch.setattr("sys.argv", ["pytorch_fid", *map(str, folders), *arguments])
    score.main()
    theirs = capsys.readouterr().out.splitlines()[-1]
    ours = run("fid", *folders, *arguments).splitlines()[-1]
    assert ours.rpartition("  ")[0] == theirs.rpartition("  ")[0] == "FID:"
    value = float(theirs.rpartition("  ")[2])
    assert float(ours.rpartition("  ")[2]) == pytest.approx(value, rel=1e-3)
    assert value > 0.1

    run("fid", "--save-stats", folders[0], tmp_path / "ours.npz", *arguments)
    score.save_fid_stats([str(folders[0]), str(tmp_path / "theirs.npz")], 40, "cpu", DIMS, 0)
    stats = [FeatureStats.load(tmp_path / f"{name}.npz") for name in ("ours", "theirs")]
    torch.testing.assert_close(stats[0].cov, stats[1].cov, rtol=1e-3, atol=1e-4 * stats[1].cov.abs().max().item())
    paths = [str(tmp_path / "ours.npz"), str(folders[1])]
    assert score.calculate_fid_given_paths(paths, 40, "cpu", DIMS, 0) == pytest.approx(value, rel=1e-3)
    ours = run("fid", tmp_path / "theirs.npz", folders[1], *arguments, "--backbone", "inception").splitlines()[-1]
    assert float(ours.rpartition("  ")[2]) == pytest.approx(value, rel=1e-3)


@pytest.fixture(autouse=True)
def sqrtm_without_disp(monkeypatch):
    """SciPy drops the argument with which both packages call it."""
    linalg = pytest.importorskip("scipy.linalg")
    plain = linalg.sqrtm
    monkeypatch.setattr(linalg, "sqrtm", lambda matrix, disp=True: plain(matrix) if disp else (plain(matrix), 0.0))


def small_features(images):
    """12 features of images in [0, 255]."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_clean_fids_numbers_and_files(folders, tmp_path, monkeypatch, mode):
    cleanfid = pytest.importorskip("cleanfid")
    fid = pytest.importorskip("cleanfid.fid")
    monkeypatch.setattr(cleanfid, "__file__", str(tmp_path / "__init__.py"))  # beside which it keeps its files
    monkeypatch.setattr(fid, "build_feature_extractor", lambda *args, **kwargs: small_features)
    options = {"mode": mode, "device": torch.device("cpu"), "num_workers": 0, "verbose": False}
    fid.make_custom_stats("b", str(folders[1]), **options)
    theirs = FeatureStats.load(tmp_path / "stats" / f"b_{mode}_custom_na.npz")

    backbone = Backbone(lambda x: small_features(255 * x), name="small", dim=12, input_size=299)
    ours = [folder_stats(folder, backbone, resize=mode) for folder in folders]
    torch.testing.assert_close(ours[1].mean, theirs.mean, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours[1].cov, theirs.cov, rtol=1e-4, atol=1e-3)

    ours[0].save(tmp_path / "stats" / f"a_{mode}_custom_na.npz", root=True)
    mu, sigma = fid.get_reference_statistics("a", "na", mode=mode, split="custom")
    expected = fid.frechet_distance(mu, sigma, theirs.mean.numpy(), theirs.cov.numpy())
    assert frechet_distance(ours[0], theirs) == pytest.approx(expected, rel=1e-6)
