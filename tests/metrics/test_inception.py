"""FID's Inception-v3, with random weights: the published ones are not at hand everywhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision")

from torchvision.models import inception_v3

from fastgan.metrics import InputError, load_backbone
from fastgan.metrics.backbones import inception


@pytest.fixture(scope="module")
def network():
    """Weights at which activations neither die nor grow, and normalisations that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    network = inception.InceptionV3().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.weight, 0.7, 1.3),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.7, 1.3),
            ):
                nn.init.uniform_(value, low, high, generator=generator)
    return network


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


def test_weights_of_another_network(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth does not fit InceptionV3"):
        load_backbone("inception", weights=tmp_path / "w.pth")
