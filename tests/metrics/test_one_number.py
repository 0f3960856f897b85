"""One pair of sets through every door: Python's functions, both commands, files of statistics."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.data.resize import resize_tensor
from fastgan.metrics import (
    FrechetInceptionDistance,
    folder_stats,
    frechet_distance,
    get_protocol,
    image_stats,
    load_backbone,
)
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


def spatial_features(state, x):
    """``mixed_6/conv:0`` of the TensorFlow graph of 2015-12-05, its first 7 channels, as guided-diffusion's evaluator
    flattens them: (n, 17, 17, 7) to (n, 2023). Written out from the graph, in float64; the comments have its names."""

    def conv(name, x, stride=1, padding=0):
        weight, norm = (
            state[f"{name}.conv.weight"].double(),
            [state[f"{name}.bn.{key}"].double() for key in ("running_mean", "running_var", "weight", "bias")],
        )
        return F.relu(F.batch_norm(F.conv2d(x, weight, stride=stride, padding=padding), *norm, eps=1e-3))

    def chain(name, layers, x):
        for layer, size in layers:
            x = conv(f"{name}.{layer}", x, padding=[side // 2 for side in size])
        return x

    def average(x):  # of 3 x 3, the padding not counted
        ones = torch.ones_like(x[:1, :1])
        total, count = (F.avg_pool2d(each, 3, 1, 1, count_include_pad=True) for each in (x, ones))
        return total / count

    x = conv("Conv2d_1a_3x3", x, stride=2)  # conv
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x), padding=1)  # conv_1, conv_2
    x = F.max_pool2d(x, 3, 2)  # pool
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)  # conv_3, conv_4, pool_1
    one, row, column = (1, 1), (1, 7), (7, 1)
    double = [("branch3x3dbl_1", one), ("branch3x3dbl_2", (3, 3)), ("branch3x3dbl_3", (3, 3))]
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):  # mixed, mixed_1, mixed_2
        towers = ([("branch1x1", one)], [("branch5x5_1", one), ("branch5x5_2", (5, 5))], double)
        pooled = conv(f"{name}.branch_pool", average(x))
        x = torch.cat([*(chain(name, tower, x) for tower in towers), pooled], dim=1)
    tower = conv("Mixed_6a.branch3x3dbl_3", chain("Mixed_6a", double[:2], x), stride=2)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, stride=2), tower, F.max_pool2d(x, 3, 2)], dim=1)  # mixed_3
    for name in ("Mixed_6b", "Mixed_6c"):  # mixed_4, mixed_5
        towers = (
            [("branch1x1", one)],
            [("branch7x7_1", one), ("branch7x7_2", row), ("branch7x7_3", column)],
            [("branch7x7dbl_1", one), *((f"branch7x7dbl_{i}", row if i % 2 else column) for i in range(2, 6))],
        )
        pooled = conv(f"{name}.branch_pool", average(x))
        x = torch.cat([*(chain(name, tower, x) for tower in towers), pooled], dim=1)
    return conv("Mixed_6d.branch1x1", x).permute(0, 2, 3, 1)[..., :7].reshape(len(x), -1)  # mixed_6/conv


def test_sfid_of_the_same_pass_and_of_its_own(sets, tmp_path):
    """guided-diffusion's features, beside the FID's 2048 and alone, and the distance of them by its formula."""
    _, pixels, weights = sets
    few = [images[: 3 + side] for side, images in enumerate(pixels)]
    folders = [tmp_path / name for name in "ab"]
    for folder, images in zip(folders, few, strict=True):
        folder.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    network, both = (load_backbone("inception", weights=weights, dims=dims) for dims in ("spatial", "2048+spatial"))
    assert (network.dim, both.dim, both.extra) == (2023, 2048, 2023)
    plain = load_backbone("inception", weights=weights)
    protocol, state = get_protocol("pytorch-fid"), torch.load(weights)
    inputs = [protocol.to_inception(resize_tensor(images.float(), 299, protocol.resize)).double() for images in few]
    expected = [spatial_features(state, x) for x in inputs]
    scale = expected[0].abs().max().item()
    torch.testing.assert_close(network(few[0]).double(), expected[0], rtol=0, atol=2e-5 * scale)
    found = both(few[0])
    torch.testing.assert_close(found[:, 2048:].double(), expected[0], rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(found[:, :2048], plain(few[0]), rtol=1e-4, atol=1e-4)

    x, y = (rows - rows.mean(0) for rows in expected)
    cross = torch.linalg.matrix_norm(x @ y.mT, "nuc") / ((len(x) - 1) * (len(y) - 1)) ** 0.5  # tr (S T)^(1/2)
    variances = x.square().sum() / (len(x) - 1) + y.square().sum() / (len(y) - 1)
    distance = ((expected[0].mean(0) - expected[1].mean(0)).square().sum() + variances - 2 * cross).item()
    options = ["--weights", weights, "--json"]
    alone = json.loads(run("fid", *folders, "--dims", "spatial", *options))
    assert alone["metric"] == f"FD ({plain.name}, spatial features)"
    assert alone["value"] == pytest.approx(distance, rel=1e-4)
    checkpoint = ["--checkpoint", tmp_path / "unfinished"]
    together = json.loads(run("evaluate", *folders, "--metrics", "fid,sfid", *options, *checkpoint))
    values = together["sets"][0]["metrics"]
    assert values[f"sFD ({plain.name})"]["value"] == pytest.approx(distance, rel=1e-4)
    pooled = frechet_distance(*(image_stats(images, plain) for images in few))
    assert values[f"FD ({plain.name})"]["value"] == pytest.approx(pooled, rel=1e-4)
    run("stats", "save", folders[1], tmp_path / "b.npz", "--dims", "spatial", "--weights", weights)
    saved = json.loads(run("fid", folders[0], tmp_path / "b.npz", *options))
    assert saved["value"] == pytest.approx(alone["value"], rel=1e-6)
