"""The vision transformer that discriminates: shapes, gradient penalties, arguments."""

import pytest
import torch

from fastgan.losses import r1_penalty
from fastgan.models import ResNetDiscriminator, ResNetGenerator, ViTDiscriminator
from fastgan.ops import _attention as attention_ops


def small(**changes):
    return ViTDiscriminator(**({"resolution": 16, "image_channels": 1, "width": 16, "depth": 2} | changes))


@pytest.mark.parametrize("attention", ["product", "cosine", "distance"])
@pytest.mark.parametrize(("head", "n_classes"), [("plain", 0), ("projection", 3), ("auxiliary", 3)])
def test_shapes_and_gradients(attention, head, n_classes):
    discriminator = small(attention=attention, head=head, n_classes=n_classes)
    images, labels = torch.randn(4, 1, 16, 16), torch.arange(4) % 3
    output = discriminator(images, labels if n_classes else None)
    logits = output[0] if head == "auxiliary" else output
    assert logits.shape == (4,)
    if head == "auxiliary":
        assert output[1].shape == (4, 3)
    logits.sum().backward()
    unused = [name for name, p in discriminator.named_parameters() if p.grad is None and "classes" not in name]
    assert not unused


@pytest.mark.parametrize("attention", ["product", "cosine", "distance"])
def test_a_penalty_through_the_ops_equals_one_through_eager_attention(attention, monkeypatch):
    monkeypatch.setattr(attention_ops, "SMALL_MAPS", 0)
    discriminator, images = small(attention=attention).double(), torch.randn(3, 1, 16, 16, dtype=torch.float64)
    results = []
    for impl in ("auto", "eager"):
        for block in discriminator.blocks:
            block.attention.impl = impl
        penalty = r1_penalty(discriminator, images)
        gradients = torch.autograd.grad(penalty, list(discriminator.parameters()), allow_unused=True)
        results.append([penalty, *(g for g in gradients if g is not None)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)
    assert results[0][0] > 0


def test_patches():
    assert small(patch=2).position.shape == (64, 16)
    assert small().position.shape == (64, 16)
    assert small(patch=4).position.shape == (16, 16)
    assert small(resolution=28).position.shape == (49, 16)
    assert small(resolution=48).position.shape == (64, 16)


@pytest.mark.parametrize("attention", ["product", "cosine", "distance"])
def test_residual_networks_with_it(attention):
    shared = {"resolution": 16, "image_channels": 1, "width": 8, "attention_resolution": 8, "attention": attention}
    generator, discriminator = ResNetGenerator(dim_z=4, **shared), ResNetDiscriminator(**shared)
    for network in (generator, discriminator):
        torch.nn.init.ones_(network.attention.gamma)
    images = generator(torch.randn(3, 4))
    assert images.shape == (3, 1, 16, 16)
    penalty = r1_penalty(discriminator, images.detach())
    penalty.backward()
    assert discriminator.attention.attention.qkv.weight.grad.count_nonzero() > 0


def test_spectral_norm_of_all_weights():
    discriminator = small(spectral_norm=True)
    discriminator(torch.randn(2, 1, 16, 16))
    weight = discriminator.blocks[0].attention.qkv.weight
    for _ in range(30):
        discriminator(torch.randn(2, 1, 16, 16))
    weight = discriminator.blocks[0].attention.qkv.weight
    assert torch.linalg.matrix_norm(weight.detach(), 2) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "patch must divide resolution, 16, got 3"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_heads": 3}, "channels must be a positive multiple of num_heads, got 16 for 3 heads"),
        ({"attention": "cos"}, "logits must be one of"),
        ({"head": "none"}, "head must be one of"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)
    with pytest.raises(ValueError, match="images must have shape"):
        small()(torch.ones(1, 3, 16, 16))
