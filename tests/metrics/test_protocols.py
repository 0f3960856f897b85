"""Each protocol against the code of the package it is named after, on random weights, feature by feature."""

import functools
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastgan._checks import InputError
from fastgan.data.resize import RESIZE_METHODS
from fastgan.metrics import (
    PROTOCOLS,
    Backbone,
    FeatureStats,
    frechet_distance,
    get_protocol,
    image_stats,
    load_backbone,
)
from fastgan.metrics.backbones.inception import InceptionV3
from fastgan.metrics.feature_metric import FeatureMetric
from fastgan.metrics.protocols import default_protocol
from tests.metrics.random_weights import randomize

ROUNDING = 2e-5  # of the largest feature: 94 float32 convolutions, their normalizations folded or not
FEATURES = (64, 192, 768, 2048)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(randomize(InceptionV3()).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ours(weights):
    """Features by fastgan's network of so many, which is loaded once."""
    load = functools.cache(lambda dims: load_backbone("inception", weights=weights, dims=dims))
    return lambda dims, protocol, pixels: load(dims)(pixels, protocol=protocol)


def images(size):
    """8-bit images of structure: an edge, a gradient and noise, so that each filter differs from the others."""
    height, width = size
    rng = np.random.default_rng(height)
    pixels = rng.integers(0, 256, (2, 3, height, width))
    pixels[0, 0] = np.linspace(0, 255, width).astype(int)
    pixels[1, :, :, width // 3 :] = 255
    return torch.from_numpy(pixels.astype(np.uint8))


SIZES = ((24, 31), (299, 299), (350, 421))  # upsampled, as it is, downsampled


def agree(ours, theirs):
    assert ours.shape == theirs.shape
    scale = theirs.abs().max()
    assert scale > 0
    assert (ours - theirs).abs().max() <= ROUNDING * scale


NAMES = (*map(str, FEATURES), "logits_unbiased", "logits")


@pytest.fixture(scope="module")
def fidelitys(weights):
    """torch-fidelity's network, which gives all features at a time."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    return fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", [*NAMES], feature_extractor_weights_path=str(weights)
    )


@pytest.mark.parametrize("size", SIZES)
def test_torch_fidelity(ours, fidelitys, size):
    for name, expected in zip(NAMES, fidelitys(images(size)), strict=True):
        found = ours(name, "torch-fidelity", images(size))
        agree(found, expected)
        if name == "64":  # the graph that it reproduces
            assert torch.equal(ours(name, "tensorflow", images(size)), found)


@pytest.mark.parametrize("antialias", [True, False])
def test_torchmetrics(weights, ours, antialias):
    pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    protocol = get_protocol("torchmetrics", None if antialias else "legacy_tensorflow")
    for dims in (64, 2048):
        theirs = NoTrainInceptionV3("inception-v3-compat", [str(dims)], str(weights), antialias)
        for size in SIZES:
            agree(ours(dims, protocol, images(size)), theirs(images(size)))
    for size in SIZES:
        floats = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        agree(ours(2048, protocol, floats), theirs((floats * 255).byte()))  # as its metrics do


def test_pytorch_fid(weights, ours, monkeypatch):
    pytorch_fid = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *args, **kwargs: torch.load(weights))
    theirs = pytorch_fid.InceptionV3([0, 3]).eval()
    for size in SIZES:
        with torch.no_grad():
            expected = theirs(images(size).float() / 255)
        for dims, maps in zip((64, 2048), expected, strict=True):
            agree(ours(dims, "pytorch-fid", images(size)), maps.mean((2, 3)))


@pytest.mark.parametrize("size", SIZES)
def test_clean_fid(weights, ours, size, tmp_path):
    """Its resizing and its network's input; its TorchScript file of the layers is not at hand."""
    torchscript = pytest.importorskip("cleanfid.inception_torchscript")
    resizing = pytest.importorskip("cleanfid.resize")
    from PIL import Image

    from fastgan.metrics import folder_stats

    network = InceptionV3()
    network.load_state_dict(torch.load(weights))
    wrapper = torchscript.InceptionV3W.__new__(torchscript.InceptionV3W)
    nn.Module.__init__(wrapper)
    wrapper.layers, wrapper.resize_inside = network.eval(), False
    pixels = images(size).permute(0, 2, 3, 1).numpy()
    resize = resizing.build_resizer("clean")
    with torch.no_grad():
        expected = wrapper(torch.stack([torch.from_numpy(resize(image)).permute(2, 0, 1) for image in pixels]))
    agree(ours(2048, "clean-fid", images(size)), expected)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    stats = folder_stats(tmp_path, load_backbone("inception", weights=weights), protocol="clean-fid")
    agree(stats.mean.float(), expected.mean(0))


def test_each_protocol_gives_another_number(ours):
    """Were two alike, the tests above could not tell them apart."""
    a = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = {name: ours(64, name, a) for name in PROTOCOLS}
    scale = features["pytorch-fid"].abs().max()
    for name, other in (
        ("pytorch-fid", "clean-fid"),
        ("clean-fid", "torchmetrics"),
        ("torchmetrics", "torch-fidelity"),
        ("torch-fidelity", "pytorch-fid"),
    ):
        assert (features[name] - features[other]).abs().max() > 50 * ROUNDING * scale
    assert torch.equal(features["tensorflow"], features["torch-fidelity"])


def test_names():
    assert get_protocol("pytorch-fid", "legacy_pytorch").name == "pytorch-fid"
    overridden = get_protocol("pytorch-fid", "clean")
    assert (overridden.name, overridden.resize, overridden.center) == ("pytorch-fid+clean", "clean", 127.5)
    assert get_protocol(overridden.name) == overridden
    assert get_protocol(overridden) == overridden
    assert (default_protocol("inception-01234567"), default_protocol("dinov2")) == ("pytorch-fid", "clean-fid")
    with pytest.raises(InputError, match="protocol must be one of pytorch-fid, clean-fid, .*, got cleanfid"):
        get_protocol("cleanfid")
    with pytest.raises(ValueError, match="resize must be one of .*, got 'sharp'"):
        get_protocol("clean-fid", "sharp")


def test_statistics_of_two_protocols_are_not_compared(tmp_path):
    network = Backbone(lambda x: x.mean((2, 3)), name="mean color", input_size=8)
    pixels = torch.randint(0, 256, (9, 3, 5, 5), dtype=torch.uint8)
    stats = [image_stats(pixels, network, protocol=name) for name in ("clean-fid", "torch-fidelity", "tensorflow")]
    for other in stats[1:]:
        with pytest.raises(InputError, match="differ in protocol: clean-fid and"):
            frechet_distance(stats[0], other)
    with pytest.raises(InputError, match="differ in protocol: torch-fidelity and tensorflow"):
        stats[1].merge(stats[2])
    stats[0].save(tmp_path / "stats.npz")
    read = FeatureStats.load(tmp_path / "stats.npz")
    assert (read.protocol, read.resize) == ("clean-fid", "clean")
    assert frechet_distance(read, stats[0]) == 0


@pytest.mark.parametrize(
    ("backbone", "resize", "protocol"),
    [
        ("inception", "legacy_pytorch", "pytorch-fid"),
        ("inception", "clean", "pytorch-fid+clean"),
        ("efficientnet_lite0", "clean", "clean-fid"),
        (None, "clean", None),
    ],
)
def test_files_from_before_protocols(tmp_path, backbone, resize, protocol):
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "resize": np.array(resize)}
    np.savez(tmp_path / "old.npz", **arrays, **({} if backbone is None else {"backbone": np.array(backbone)}))
    assert FeatureStats.load(tmp_path / "old.npz").protocol == protocol


ROOT = Path(__file__).parents[2]


def rows_of_table(path, beginning):
    """The rows, split into cells, of the Markdown table whose first line begins so."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(beginning))
    table = lines[start + 2 :]
    end = next((i for i, line in enumerate(table) if not line.startswith("|")), len(table))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[:end]]


def test_the_table_of_protocols_is_true():
    rows = rows_of_table("fastgan/metrics/README.md", "| protocol |")
    assert [row[0].split("`")[1] for row in rows] == list(PROTOCOLS)
    for (name, resize, given, floats), protocol in zip(rows, PROTOCOLS.values(), strict=True):
        assert resize == f"`{protocol.resize}`"
        pixels = torch.tensor([0.0, 77.0, 255.0])
        torch.testing.assert_close(protocol.to_inception(pixels), eval(given, {"x": pixels}), rtol=0, atol=1e-6)
        assert floats == ("truncated to 8 bits" if protocol.truncate else "kept")
        defaults = [network for network in ("inception", "dinov2") if default_protocol(network) == protocol.name]
        expected = {"inception": "the default for Inception", "dinov2": "the default for other networks"}
        assert all(expected[network] in name for network in defaults)
        assert ("the default for" in name) == bool(defaults)
    assert {row[0].strip("`") for row in rows_of_table("fastgan/metrics/README.md", "| resize |")} == set(
        RESIZE_METHODS
    )


def test_the_table_of_packages_is_true():
    """Each package's row names its own protocol, which the tests above compare with that package's code."""
    named = {row[0].split(",")[0]: row[1] for row in rows_of_table("docs/protocols.md", "| to reproduce |")}
    packages = {"the TensorFlow original": "tensorflow"}
    assert [packages.get(name, name) for name in named] == list(PROTOCOLS)
    for package, way in named.items():
        assert f"`--protocol {packages.get(package, package)}`" in way
    parameters = inspect.signature(FeatureMetric.__init__).parameters
    assert parameters["protocol"].default == "torchmetrics"
    assert "default" in named["torchmetrics"]
    assert "default" in named[default_protocol("inception")]
