"""The conditional SAGAN: shapes, gradients, determinism, arguments."""

import copy
import io

import pytest
import torch

from fastgan.models import SAGANDiscriminator, SAGANGenerator, check_labels


def small_generator(**changes):
    return SAGANGenerator(**({"n_classes": 3, "image_channels": 1, "dim_z": 12, "width": 8} | changes))


def small_discriminator(**changes):
    return SAGANDiscriminator(**({"n_classes": 3, "image_channels": 1, "width": 8} | changes))


def latents(n=4, dim_z=12, n_classes=3):
    return torch.randn(n, dim_z), torch.arange(n) % n_classes


@pytest.mark.parametrize(
    ("resolution", "attention_resolution", "max_multiplier"),
    [(16, 8, 4), (32, 16, 4), (32, 8, 1), (64, 32, 2), (28, 14, 4), (48, 12, 2)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(resolution, attention_resolution, max_multiplier, channels):
    shared = {
        "resolution": resolution,
        "attention_resolution": attention_resolution,
        "max_multiplier": max_multiplier,
        "image_channels": channels,
    }
    z, labels = latents(2)
    generator = small_generator(**shared)
    attended = []
    generator.attention.register_forward_hook(lambda _, inputs, __: attended.append(inputs[0].shape[-1]))
    images = generator(z, labels)
    assert images.shape == (2, channels, resolution, resolution)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    discriminator = small_discriminator(**shared)
    discriminator.attention.register_forward_hook(lambda _, inputs, __: attended.append(inputs[0].shape[-1]))
    logits = discriminator(images, labels)
    assert logits.shape == (2,)
    assert attended == [attention_resolution] * 2


def test_float64_and_channels_last():
    z, labels = latents()
    generator, discriminator = small_generator().double(), small_discriminator().double()
    last = [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in (generator, discriminator)]
    images = generator(z.double(), labels)
    assert images.dtype == torch.float64
    torch.testing.assert_close(last[0](z.double(), labels), images, rtol=1e-11, atol=1e-11)
    logits = discriminator(images, labels)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last[1](channels_last, labels), logits, rtol=1e-11, atol=1e-11)


def test_non_contiguous_images():
    discriminator = small_discriminator(image_channels=3).double().eval()
    images = torch.rand(2, 32, 32, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    labels = torch.tensor([0, 2])
    torch.testing.assert_close(
        discriminator(images, labels), discriminator(images.contiguous(), labels), rtol=1e-11, atol=1e-11
    )


def open_attention(module):
    """At gamma = 0 the attention's convolutions get no gradient; give it a value as after some training."""
    with torch.no_grad():
        module.attention.gamma.fill_(0.5)


def test_attention_starts_closed_but_learns():
    generator = small_generator()
    assert generator.attention.gamma == 0
    generator(*latents()).square().sum().backward()
    assert generator.attention.gamma.grad != 0


def test_gradients_reach_every_parameter():
    generator, discriminator = small_generator(), small_discriminator()
    open_attention(generator)
    open_attention(discriminator)
    z, labels = latents(6)
    discriminator(generator(z, labels), labels).square().sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_every_weight_is_spectrally_normalized():
    for network in (small_generator(), small_discriminator()):
        layers = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding))]
        assert layers
        for layer in layers:
            assert torch.nn.utils.parametrize.is_parametrized(layer, "weight")
    # Long power iterations: the largest singular value comes out as one.
    discriminator = small_discriminator()
    images, labels = torch.rand(2, 1, 32, 32), torch.tensor([0, 1])
    for _ in range(100):
        discriminator(images, labels)
    discriminator.eval()
    for layer in (discriminator.blocks[0].conv2, discriminator.head.linear, discriminator.head.embed):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


def test_spectral_norm_can_be_left_out():
    for network in (small_generator(spectral_norm=False), small_discriminator(spectral_norm=False)):
        assert not any(torch.nn.utils.parametrize.is_parametrized(m) for m in network.modules())


def test_labels_matter():
    # At the start the tables of the conditional batch norm are the same for every class.
    generator, discriminator = small_generator().eval(), small_discriminator().eval()
    z, labels = latents()
    with torch.no_grad():
        generator.norm.shift.normal_()
    images = generator(z, labels)
    assert not torch.allclose(images, generator(z, (labels + 1) % 3))
    assert not torch.allclose(discriminator(images, labels), discriminator(images, (labels + 1) % 3))


def test_images_do_not_depend_on_their_batch_in_eval():
    generator = small_generator().double().eval()
    z, labels = torch.randn(5, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(generator(z, labels)[3:4], generator(z[3:4], labels[3:4]), rtol=1e-10, atol=1e-10)


def test_seed_decides_the_weights():
    def state(seed):
        torch.manual_seed(seed)
        return small_generator().state_dict()

    first, second, other = state(0), state(0), state(1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_state_dict_round_trip():
    source = small_generator()
    z, labels = latents()
    source(z, labels)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = small_generator()
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(target.eval()(z, labels), source.eval()(z, labels))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_classes": 0}, "n_classes must be at least 1"),
        ({"resolution": 33}, "resolution must be 4, 5, 6 or 7 times a power of two, at least 16, got 33"),
        ({"resolution": 8}, "resolution must be 4, 5, 6 or 7 times a power of two, at least 16"),
        ({"image_channels": 0}, "image_channels must be at least 1"),
        ({"width": 12}, "width must be a positive multiple of 8"),
        ({"max_multiplier": 0}, "max_multiplier must be at least 1"),
        ({"attention_resolution": 32}, "attention_resolution must be one of 8, 16 at resolution 32"),
        ({"attention_resolution": 12}, "attention_resolution must be one of 8, 16 at"),
    ],
)
def test_bad_architecture(changes, match):
    for build in (small_generator, small_discriminator):
        with pytest.raises(ValueError, match=match):
            build(**changes)


def test_bad_dim_z():
    with pytest.raises(ValueError, match="dim_z must be at least 1"):
        small_generator(dim_z=0)


def test_bad_input():
    generator, discriminator = small_generator(), small_discriminator()
    z, labels = latents()
    images = torch.zeros(4, 1, 32, 32)
    with pytest.raises(ValueError, match=r"z must have shape \(n, 12\)"):
        generator(torch.randn(4, 11), labels)
    with pytest.raises(ValueError, match="z must have 2 dimensions"):
        generator(torch.randn(4, 12, 1), labels)
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, 32, 32\)"):
        discriminator(torch.zeros(4, 3, 32, 32), labels)
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, 32, 32\)"):
        discriminator(torch.zeros(4, 1, 31, 31), labels)
    for call in (lambda y: generator(z, y), lambda y: discriminator(images, y)):
        with pytest.raises(ValueError, match=r"labels must have shape \(4,\)"):
            call(labels[:3])
        with pytest.raises(ValueError, match="labels must have dtype int64"):
            call(labels.float())
        with pytest.raises(ValueError, match="labels must have 1 dimension"):
            call(torch.nn.functional.one_hot(labels))


def test_check_labels():
    check_labels(torch.tensor([0, 2]), 3)
    for bad in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
            check_labels(torch.tensor(bad), 3)


def test_networks_can_be_built_without_memory_and_filled():
    sizes = {"resolution": 16, "width": 8, "attention_resolution": 8}
    torch.manual_seed(1)
    inputs = torch.randn(2, 8), torch.tensor([0, 2])
    for cls, arguments in ((SAGANGenerator, {"dim_z": 8}), (SAGANDiscriminator, {})):
        made = cls(3, **sizes, **arguments).eval()
        with torch.device("meta"):
            hollow = cls(3, **sizes, **arguments)
        shape = made(*inputs).shape
        for mode in (True, False):  # twice, as a norm's weight is kept in eval mode
            assert hollow.train(mode)(*(x.to("meta") for x in inputs)).shape == shape
            with torch.no_grad():
                assert hollow(*(x.to("meta") for x in inputs)).shape == shape
        hollow.to_empty(device="cpu").load_state_dict(made.state_dict())
        assert torch.equal(hollow(*inputs), made(*inputs))
        inputs = made(*inputs).detach(), inputs[1]
