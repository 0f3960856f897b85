"""``fuse`` on the models of published packages, as they are. What is not installed is skipped.

torch-mimicry demands tensorflow, which ``[dev]`` does not bring. ``pip install --no-deps torch-mimicry`` is enough
here, where only its networks are imported.
"""

import importlib
import importlib.util
import sys
import types
from collections import Counter

import pytest
import torch
from torch import nn

from fastgan.nn import SelfAttention2d, fuse, unfuse

OLDER, WRAPPER = "torch.nn.utils.spectral_norm", "module that wraps a layer for its spectral norm"
ATTENTION = "self-attention block"


def mimicry(module):
    """A module of torch_mimicry, without the imports of the package itself, which takes tensorflow for its metrics."""
    spec = importlib.util.find_spec("torch_mimicry")
    if spec is None:
        pytest.skip("could not import 'torch_mimicry'")
    if "torch_mimicry" not in sys.modules:
        package = types.ModuleType("torch_mimicry")
        package.__spec__ = spec
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["torch_mimicry"] = package
    return importlib.import_module(f"torch_mimicry.{module}")


def mimicry_critic():
    network = mimicry("nets.sagan.sagan_128").SAGANDiscriminator128(num_classes=10, ndf=128)
    return network, (torch.randn(2, 3, 32, 32), torch.tensor([1, 7]))


def mimicry_generator():
    return mimicry("nets.sagan.sagan_32").SAGANGenerator32(num_classes=10, ngf=32), (torch.randn(2, 128),)


def mimicry_sngan():
    return mimicry("nets.sngan.sngan_32").SNGANDiscriminator32(ndf=16), (torch.randn(2, 3, 32, 32),)


def mimicry_stored():
    layers = mimicry("modules.spectral_norm")
    network = nn.Sequential(layers.SNConv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), layers.SNLinear(8 * 36, 2))
    return network, (torch.randn(2, 3, 8, 8),)


def pretrained_biggan():
    package = pytest.importorskip("pytorch_pretrained_biggan")
    layers = [(False, 16, 16), (True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)]
    sizes = {"z_dim": 8, "class_embed_dim": 8, "channel_width": 8, "num_classes": 10, "n_stats": 3}
    network = package.BigGAN(package.BigGANConfig(32, layers=layers, attention_layer_position=3, **sizes))
    nn.init.ones_(network.generator.bn.weight)  # the package leaves both to the checkpoint that it downloads
    nn.init.zeros_(network.generator.bn.bias)
    return network, (torch.randn(2, 8), torch.eye(10)[:2], 0.5)


def torchgan():
    layers = pytest.importorskip("torchgan.layers")
    norm = layers.SpectralNorm2d
    return nn.Sequential(norm(nn.Conv2d(3, 16, 3)), layers.SelfAttention2d(16), norm(nn.Conv2d(16, 4, 3))), (
        torch.randn(2, 3, 12, 12),
    )


def attn_gan():
    layers = pytest.importorskip("attn_gan_pytorch.CustomLayers")
    network = nn.Sequential(layers.SpectralNorm(nn.Conv2d(3, 16, 3)), layers.SelfAttention(16))
    return network, (torch.randn(2, 3, 12, 12),)


CASES = {  # what is swapped, and what is left for a reason
    mimicry_critic: ({OLDER: 23, ATTENTION: 1}, {}),
    mimicry_generator: ({OLDER: 15, ATTENTION: 1}, {}),
    mimicry_sngan: ({OLDER: 11}, {}),
    mimicry_stored: ({"spectral norm in sn_weights with sn_u": 2}, {}),
    pretrained_biggan: ({OLDER: 66, ATTENTION: 1}, {}),
    torchgan: ({WRAPPER: 2}, {ATTENTION: "differ"}),  # its softmax is over the queries
    attn_gan: ({WRAPPER: 1, ATTENTION: 1}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_package(make):
    network, inputs = make()
    swapped, refused = CASES[make]
    fused, report = fuse(network, inputs, copy=True)
    assert Counter(part.what for part in report.swapped) == swapped, str(report)
    assert {part.what: True for part in report.refused} == dict.fromkeys(refused, True), str(report)
    for part in report.refused:
        assert refused[part.what] in part.reason
    assert sum(isinstance(m, SelfAttention2d) for m in fused.modules()) == swapped.get(ATTENTION, 0)
    assert list(fused.state_dict()) == list(network.state_dict())

    for training in (True, False):  # training first: eval mode divides by what vectors that were never updated give
        outputs = []
        for model in (network, fused):
            torch.manual_seed(1)  # some draw labels
            outputs.append(model.train(training)(*inputs))
        for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in outputs), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    network.load_state_dict(fused.state_dict())
    fused.load_state_dict(network.state_dict())
    assert [type(m) for m in unfuse(fused).modules()] == [type(m) for m in network.modules()]
