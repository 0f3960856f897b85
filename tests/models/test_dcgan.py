"""DCGAN and its relatives: shapes, widths, conditioning, and where gradients reach."""

import pytest
import torch
from torch import nn

from fastgan.models import DCGANDiscriminator, DCGANGenerator


def channels(network, kind):
    return [m.out_channels for m in network.modules() if isinstance(m, kind)]


def test_the_original_64x64_network():
    generator, discriminator = DCGANGenerator(), DCGANDiscriminator()
    assert generator.linear.weight.shape == (512 * 16, 100)
    assert channels(generator, nn.ConvTranspose2d) == [256, 128, 64, 3]
    assert channels(discriminator, nn.Conv2d) == [64, 128, 256, 512]
    assert len([m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)]) == 3
    weights = torch.cat([p.flatten() for m in (generator, discriminator) for p in m.parameters() if p.ndim > 1])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("resolution", [16, 20, 28, 48, 64, 128])
def test_every_resolution(resolution):
    shared = {"resolution": resolution, "image_channels": 1, "width": 8}
    images = DCGANGenerator(dim_z=6, **shared)(torch.randn(2, 6))
    assert images.shape == (2, 1, resolution, resolution)
    assert images.abs().max() <= 1
    assert DCGANDiscriminator(**shared)(images).shape == (2,)


@pytest.mark.parametrize("norm", ["none", "batch", "instance", "spectral"])
@pytest.mark.parametrize("head", ["plain", "projection", "auxiliary", "one-hot"])
def test_heads_and_norms(norm, head):
    discriminator = DCGANDiscriminator(
        3, resolution=16, image_channels=1, width=8, norm=norm, head=head, attention_resolution=8
    ).train(norm == "batch")
    images = torch.randn(6, 1, 16, 16)
    if head == "auxiliary":
        logits, classes = discriminator(images, torch.zeros(6, dtype=torch.int64))
        assert classes.shape == (6, 3)
    else:
        logits = discriminator(images, torch.zeros(6, dtype=torch.int64))
    assert logits.shape == (6,)
    other = discriminator(images, torch.ones(6, dtype=torch.int64))
    other = other[0] if head == "auxiliary" else other
    assert torch.equal(logits, other) == (head in ("plain", "auxiliary"))


def test_the_label_reaches_the_images():
    generator = DCGANGenerator(3, resolution=16, image_channels=1, dim_z=4, width=8).eval()
    z = torch.randn(1, 4).expand(2, -1)
    first, second = generator(z, torch.tensor([0, 2]))
    assert not torch.equal(first, second)


def test_one_hot_maps_join_after_the_attention():
    discriminator = DCGANDiscriminator(5, resolution=32, width=8, head="one-hot", attention_resolution=8)
    assert [block[0].in_channels for block in discriminator.blocks] == [3, 8, 16 + 5]
    discriminator = DCGANDiscriminator(5, resolution=32, width=8, head="one-hot")
    assert [block[0].in_channels for block in discriminator.blocks] == [3, 8 + 5, 16]


def test_attention_starts_as_the_identity_and_learns():
    generator = DCGANGenerator(resolution=32, dim_z=4, width=8, attention_resolution=16)
    assert generator.attention.gamma == 0
    assert generator.attention.in_channels == 8
    generator(torch.randn(4, 4)).square().mean().backward()
    assert generator.attention.gamma.grad != 0


def test_bad_input():
    with pytest.raises(ValueError, match="norm must be one of 'none', 'batch', 'instance', 'spectral', got 'layer'"):
        DCGANDiscriminator(norm="layer")
    with pytest.raises(ValueError, match="head must be one of"):
        DCGANDiscriminator(head="two")
    with pytest.raises(ValueError, match="head 'one-hot' needs n_classes of at least 1"):
        DCGANDiscriminator(head="one-hot")
    with pytest.raises(ValueError, match="head 'projection' needs n_classes of at least 1"):
        DCGANDiscriminator(head="projection")
    with pytest.raises(ValueError, match="n_classes must be at least 0"):
        DCGANGenerator(-1)
    with pytest.raises(ValueError, match="labels must be given to a conditional network"):
        DCGANGenerator(3, resolution=16, width=8)(torch.randn(2, 100))
    with pytest.raises(ValueError, match=r"images must have shape \(n, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        DCGANDiscriminator(width=8)(torch.zeros(1, 3, 32, 32))


def test_dropout_follows_each_layer_but_the_last():
    discriminator = DCGANDiscriminator(resolution=16, width=8, norm="none", dropout=0.5)
    kinds = [type(module).__name__ for block in discriminator.blocks for module in block]
    assert kinds == ["Conv2d", "LeakyReLU", "Dropout"] * 2
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(discriminator(images), discriminator(images))
    discriminator.eval()
    assert torch.equal(discriminator(images), discriminator(images))
    plain = DCGANDiscriminator(resolution=16, width=8, norm="none")
    assert plain.state_dict().keys() == discriminator.state_dict().keys()
    with pytest.raises(ValueError, match="dropout must be in .0, 1., got 1"):
        DCGANDiscriminator(dropout=1.0)
