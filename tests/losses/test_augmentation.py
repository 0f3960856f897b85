"""Differentiable augmentations against their definitions."""

import pytest
import torch
from torch import nn

from fastgan.losses.augmentation import AUGMENTATIONS, AdaptiveAugment, augment, augment_draws, color, cutout, translate
from fastgan.losses.noise import draw


def drawn(policy, images, seed=0):
    specs = augment_draws(policy, len(images), *images.shape[2:])
    return draw(specs, torch.Generator().manual_seed(seed), "cpu")


class TestTranslate:
    def test_shifts_whole_images_and_fills_in_black(self):
        images = torch.rand(64, 2, 8, 24)
        moved = augment(images, ["translation"], drawn(["translation"], images))
        assert moved.shape == images.shape
        seen = set()
        for image, result in zip(images, moved, strict=True):
            padded = nn.functional.pad(image, (3, 3, 1, 1), value=-1.0)
            matches = [
                (dy, dx)
                for dy in range(3)
                for dx in range(7)
                if torch.equal(padded[:, dy : dy + 8, dx : dx + 24], result)
            ]
            assert len(matches) == 1
            seen.update(matches)
        assert len(seen) > 15

    def test_gradient_goes_to_the_pixels_that_stay(self):
        images = torch.rand(4, 1, 8, 8, requires_grad=True)
        moved = augment(images, ["translation"], drawn(["translation"], images))
        moved.sum().backward()
        assert images.grad.sum() == (moved > -1).sum()
        assert set(images.grad.unique().tolist()) <= {0.0, 1.0}

    def test_direction(self):
        image = torch.full((1, 1, 4, 4), -1.0)
        image[0, 0, 2, 1] = 1
        moved = translate(image, torch.tensor([[1]]), torch.tensor([[-2]]))
        assert moved.argmax() == 1 * 4 + 3


def test_color_matches_its_formula():
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    brightness, saturation, contrast = torch.rand(3, 5, 1, 1, 1, dtype=torch.float64)
    got = color(images, brightness, saturation, contrast)
    for i in range(5):
        x = images[i] + brightness[i]
        gray = (x[0] + x[1] + x[2]) / 3
        x = torch.stack([(channel - gray) * saturation[i, 0, 0] + gray for channel in x])
        x = (x - x.mean()) * contrast[i] + x.mean()
        torch.testing.assert_close(got[i], x, rtol=1e-12, atol=1e-12)


def test_cutout_clears_half_the_side_around_its_centre():
    images = torch.ones(2, 1, 8, 8)
    cut = cutout(images, torch.tensor([[4], [0]]), torch.tensor([[4], [8]]))
    expected = torch.ones(2, 1, 8, 8)
    expected[0, :, 2:6, 2:6] = 0
    expected[1, :, :2, 6:] = 0
    assert torch.equal(cut, expected)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_seeds_and_gradients(name):
    images = torch.rand(16, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    first, second, other = (augment(images, [name], drawn([name], images, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    numbers = drawn([name], images[:2])
    assert torch.autograd.gradcheck(lambda x: augment(x, [name], numbers), images[:2].detach().requires_grad_(True))


def test_policy():
    images = torch.rand(2, 3, 8, 8)
    assert augment(images, (), {}) is images
    numbers = drawn(["color", "cutout"], images)
    both = augment(images, ["color", "cutout"], numbers)
    assert torch.equal(both, augment(augment(images, ["color"], numbers), ["cutout"], numbers))
    with pytest.raises(ValueError, match="augment must be names out of"):
        augment(images, ["hue"], {})
    with pytest.raises(ValueError, match=r"drawn must hold 'augment.cutout.rows' of shape .*, got None"):
        augment(images, ["cutout"], {})
    with pytest.raises(ValueError, match=r"drawn must hold 'augment.color.brightness' of shape .*, got \(1, 1, 1, 1\)"):
        augment(images, ["color"], drawn(["color"], images[:1]))
    with pytest.raises(ValueError, match="images must have 4 dimensions"):
        augment(images[0], (), {})


def test_adaptive_augmentation_moves_its_probability():
    module = AdaptiveAugment(("color", "cutout"), target=0.5, images=100)
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    numbers = draw(module.draws(64, 8, 8), torch.Generator().manual_seed(0), "cpu")
    assert torch.equal(module(images, numbers), images)
    for _ in range(3):
        module.adjust_(torch.ones(20))
    assert float(module.p) == pytest.approx(0.6)
    module.adjust_(torch.tensor([1.0] * 7 + [-1.0] * 3))  # a mean sign of 0.4
    assert float(module.p) == pytest.approx(0.5)
    untouched = (module(images, numbers) == images).flatten(1).all(1)
    assert torch.equal(untouched, numbers["augment.chosen"].flatten() >= 0.5)
    assert 16 < int(untouched.sum()) < 48
    whole = augment(images, module.policy, numbers)
    torch.testing.assert_close(module(images, numbers)[~untouched], whole[~untouched], rtol=0, atol=0)
    module.adjust_(-torch.ones(1000))
    assert float(module.p) == 0
    with pytest.raises(ValueError, match="augment must be names out of"):
        AdaptiveAugment(("hue",))
    with pytest.raises(ValueError, match=r"target must be in \(-1, 1\), got 1"):
        AdaptiveAugment(target=1)
