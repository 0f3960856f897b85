"""One pair of sets through every door: Python's functions, both commands, files of statistics."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.metrics import FrechetInceptionDistance, folder_stats, frechet_distance, image_stats, load_backbone
from fastgan.metrics.backbones.inception import InceptionV3
from tests.metrics.random_weights import randomize

DIMS = 64


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of 9 and 8 images, their pixels, and random weights."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    pixels = []
    for name, n, low in (("a", 9, 0), ("b", 8, 90)):
        images = rng.integers(low, 256, (n, 30, 41, 3), dtype=np.uint8)
        (root / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i}.png")
        pixels.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.save(randomize(InceptionV3()).state_dict(), root / "weights.pth")
    return (root / "a", root / "b"), pixels, root / "weights.pth"


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("protocol", [None, "clean-fid", "torchmetrics"])
def test_every_interface_gives_the_same_number(sets, protocol, tmp_path):
    folders, pixels, weights = sets
    network = load_backbone("inception", weights=weights, dims=DIMS)
    expected = frechet_distance(*(folder_stats(folder, network, protocol=protocol) for folder in folders))
    # Pillow and torch resize by the same filter in another order of summation
    tolerance = 1e-4 if protocol == "clean-fid" else 1e-6
    tensors = frechet_distance(*(image_stats(images, network, protocol=protocol) for images in pixels))
    assert tensors == pytest.approx(expected, rel=tolerance)
    options = ["--weights", weights, "--dims", DIMS, "--json", *(["--protocol", protocol] if protocol else [])]
    found = json.loads(run("fid", *folders, *options))
    assert found["value"] == pytest.approx(expected, rel=1e-9)
    assert found["protocol"] == (protocol or "pytorch-fid")
    evaluated = json.loads(run("evaluate", *folders, "--metrics", "fid", *options))
    assert evaluated["value"] == pytest.approx(expected, rel=1e-9)
    for folder, name in zip(folders, "ab", strict=True):
        run("stats", "save", folder, tmp_path / f"{name}.npz", *options)
    saved = json.loads(run("fid", tmp_path / "a.npz", tmp_path / "b.npz", "--json"))
    assert (saved["value"], saved["protocol"]) == (pytest.approx(expected, rel=1e-9), found["protocol"])
    if protocol == "torchmetrics":
        metric = FrechetInceptionDistance(DIMS, feature_extractor_weights_path=str(weights))
        metric.update(pixels[0], real=True)
        metric.update(pixels[1], real=False)
        assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_statistics_decide_the_protocol_and_refuse_another(sets, tmp_path):
    folders, _, weights = sets
    options = ["--weights", weights, "--dims", DIMS]
    run("stats", "save", folders[1], tmp_path / "b.npz", *options, "--protocol", "clean-fid")
    found = json.loads(run("fid", folders[0], tmp_path / "b.npz", *options, "--json"))
    assert found["protocol"] == "clean-fid"
    for other in (["--protocol", "pytorch-fid"], ["--resize", "legacy_pytorch"]):
        arguments = ["fid", folders[0], tmp_path / "b.npz", *options, *other]
        refused = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert refused.exit_code == 2
        assert "differ in protocol: clean-fid and" in refused.stderr


def test_statistics_of_other_programs_are_compared_if_weights_are_given(sets, tmp_path):
    """pytorch-fid's file names no network: with --weights it is taken for that network's."""
    folders, _, weights = sets
    network = load_backbone("inception", weights=weights, dims=DIMS)
    stats = [folder_stats(folder, network) for folder in folders]
    np.savez(tmp_path / "theirs.npz", mu=stats[1].mean.numpy(), sigma=stats[1].cov.numpy())
    for names in ([], ["--backbone", "inception"]):
        found = json.loads(run("fid", folders[0], tmp_path / "theirs.npz", "--weights", weights, *names, "--json"))
        assert found["value"] == pytest.approx(frechet_distance(*stats), rel=1e-6)
        assert found["metric"] == f"FD ({network.name})"


def test_sfid_of_the_same_pass_and_of_its_own(sets, tmp_path):
    """guided-diffusion's features: seven channels at 17 x 17 places, in TensorFlow's order; beside the FID's 2048."""
    folders, pixels, weights = sets
    network, both = (load_backbone("inception", weights=weights, dims=dims) for dims in ("spatial", "2048+spatial"))
    assert (network.dim, both.dim, both.extra) == (2023, 2048, 2023)
    images = pixels[0][:2]
    maps = []
    plain = load_backbone("inception", weights=weights)
    hook = plain._network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output))
    pooled = plain(images)
    hook.remove()
    expected = torch.cat([one[:, :7].permute(0, 2, 3, 1).reshape(len(one), -1) for one in maps])
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both(images), torch.cat([pooled, expected], dim=1), rtol=1e-4, atol=1e-4)

    options = ["--weights", weights, "--json"]
    alone = json.loads(run("fid", *folders, "--dims", "spatial", *options))
    assert alone["metric"] == f"FD ({plain.name}, spatial features)"
    checkpoint = ["--checkpoint", tmp_path / "unfinished"]
    together = json.loads(run("evaluate", *folders, "--metrics", "fid,sfid", *options, *checkpoint))
    values = together["sets"][0]["metrics"]
    assert values[f"sFD ({plain.name})"]["value"] == pytest.approx(alone["value"], rel=1e-4)
    assert values[f"FD ({plain.name})"]["value"] == pytest.approx(
        json.loads(run("fid", *folders, *options))["value"], rel=1e-4
    )
    for folder, name in zip(folders, "ab", strict=True):
        run("stats", "save", folder, tmp_path / f"{name}.npz", "--dims", "spatial", "--weights", weights)
    saved = json.loads(run("fid", folders[0], tmp_path / "b.npz", *options))
    assert saved["value"] == pytest.approx(alone["value"], rel=1e-6)
