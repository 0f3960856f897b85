"""FID's Inception-v3, with random weights: the published ones are not at hand everywhere."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision")

from torchvision.models import inception_v3

from fastgan.metrics import Backbone, InputError, load_backbone
from fastgan.metrics.backbones import inception
from fastgan.metrics.backbones.base import can_pack, resolve_precision
from fastgan.metrics.backbones.inception_network import ConvNorm
from tests.accuracy import assert_as_accurate
from tests.metrics.random_weights import randomize


@pytest.fixture(scope="module")
def network():
    return randomize(inception.InceptionV3())


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_state_dict_is_torchvisions_with_1008_classes_and_no_auxiliary_head(network):
    reference = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    assert {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}


def torchvision_with_fid_pools(network):
    """torchvision's own forward, whose pooling function the test swaps: an independent statement of FID's changes."""
    reference = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).eval()
    reference.load_state_dict(network.state_dict())
    reference.fc = nn.Identity()
    reference.dropout = nn.Identity()
    return reference


def test_pools_are_fids(network, monkeypatch):
    reference = torchvision_with_fid_pools(network)
    average = F.avg_pool2d
    images = torch.rand(1, 3, 91, 91) * 2 - 1
    with torch.inference_mode():
        expected_with_torchvisions_pools = reference(images)

        def uncounted(x, kernel_size, stride, padding):
            return average(x, kernel_size, stride, padding, count_include_pad=False)

        def last_block_maximum(x, kernel_size, stride, padding):
            return F.max_pool2d(x, kernel_size, stride, padding)

        monkeypatch.setattr(F, "avg_pool2d", uncounted)
        last_block = reference.Mixed_7c.forward

        def with_maximum(x):
            with monkeypatch.context() as context:
                context.setattr(F, "avg_pool2d", last_block_maximum)
                return last_block(x)

        reference.Mixed_7c.forward = with_maximum
        expected = reference(images)
        monkeypatch.undo()
        actual = network(images)
    torch.testing.assert_close(actual, expected)
    assert (expected - expected_with_torchvisions_pools).abs().max() > 1e-2 * expected.abs().max()


def test_backbone(network, weights):
    backbone = load_backbone("inception", weights=weights)
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    with torch.inference_mode():
        inputs = 2 * (images.float() / 255) - 1
        plain = network(inputs)
    features = backbone(images)
    assert features.shape == (1, 2048)
    assert (features - plain).norm() < 1e-4 * plain.norm()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone._network.modules())


def test_only_the_published_weights_are_called_inception(weights, monkeypatch):
    name = load_backbone("inception", weights=weights).name
    kind, _, digest = name.partition("-")
    assert kind == "inception"
    assert len(digest) == 8
    monkeypatch.setattr(inception, "HASH_PREFIX", digest)
    assert load_backbone("inception", weights=weights).name == "inception"


@pytest.fixture(scope="module")
def pytorch_fid(network):
    """pytorch-fid's own network, which it fills by a download: here by the random weights."""
    module = pytest.importorskip("pytorch_fid.inception")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: network.state_dict())
        yield module.InceptionV3([0, 1, 2, 3]).eval()


def test_every_block_equals_pytorch_fids(network, pytorch_fid, weights):
    images = torch.rand(1, 3, 75, 83)
    with torch.inference_mode():
        maps = pytorch_fid(images)
        exact = pytorch_fid.double()(images.double())
        pytorch_fid.float()
    pixels = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) * 255
    for dims, reference, truth in zip(inception.DIMS, maps, exact, strict=True):
        backbone = load_backbone("inception", weights=weights, dims=dims, precision="fp32")
        truth, reference = truth.mean(dim=(2, 3)), reference.mean(dim=(2, 3))
        features = backbone.from_pixels(pixels)
        assert features.shape == (1, dims)
        assert_as_accurate(features, reference, truth, name=f"dims {dims}")
    logits = load_backbone("inception", weights=weights, dims="logits", precision="fp32").from_pixels(pixels)
    torch.testing.assert_close(logits, network.fc(features).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.head(features), logits - network.fc.bias.detach(), rtol=1e-5, atol=1e-5)


def test_packed_convolutions_change_nothing(weights, monkeypatch):
    """Nor does another number of images than that at which the weights were packed; without oneDNN there are none."""
    packed = load_backbone("inception", weights=weights, dims=192)
    monkeypatch.setattr("fastgan.metrics.backbones.base.can_pack", lambda dtype: False)
    plain = load_backbone("inception", weights=weights, dims=192)
    convolutions = [[m.packed for m in b._network.modules() if isinstance(m, ConvNorm)] for b in (packed, plain)]
    assert can_pack(torch.float32) == all(convolutions[0])
    assert not any(convolutions[1])
    images = torch.randint(0, 256, (3, 3, 40, 30), dtype=torch.uint8)
    features = plain(images)
    for n in (2, 3, 1):
        torch.testing.assert_close(packed(images[:n]), features[:n], rtol=1e-5, atol=1e-6)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied(images), packed(images))


@pytest.mark.slow
def test_compiled_features_equal_plain_ones(weights):
    """The first blocks only: the whole network takes a minute to compile and is compared by the benchmark."""
    backbone = load_backbone("inception", weights=weights, dims=64, precision="fp32").compile()
    assert backbone._compiled is not None
    images = torch.randint(0, 256, (3, 3, 40, 30), dtype=torch.uint8)
    plain = load_backbone("inception", weights=weights, dims=64, precision="fp32")(images)
    features = backbone(images)
    assert (features - plain).norm() <= 1e-4 * plain.norm()
    torch.testing.assert_close(backbone(images[:1]), features[:1], rtol=1e-5, atol=1e-6)


def test_a_network_of_the_users_is_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    backbone = Backbone(nn.Flatten(), name="flat").compile()
    assert backbone(torch.zeros(2, 3, 1, 1)).shape == (2, 3)


def test_precision_and_dims(weights):
    cpu = torch.device("cpu")
    assert [resolve_precision(p, cpu) for p in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with pytest.raises(InputError, match="precision tf32 needs a GPU of compute capability 8.0 or newer"):
        resolve_precision("tf32", cpu)
    with pytest.raises(InputError, match="dims must be one of 64, .*, logits_unbiased for inception, got 128"):
        load_backbone("inception", weights=weights, dims=128)


def test_weights_of_another_network(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth does not fit InceptionV3"):
        load_backbone("inception", weights=tmp_path / "w.pth")
