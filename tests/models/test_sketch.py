"""The sketch-to-image networks."""

import pytest
import torch

from fastgan.losses.penalties import gradient_penalty
from fastgan.models import SketchDiscriminator, SketchGenerator


@pytest.mark.parametrize("resolution", [16, 28, 40, 64])
def test_shapes_and_dependence_on_sketch_and_label(resolution):
    generator = SketchGenerator(3, resolution=resolution, width=8).eval()
    sketches = torch.randn(1, 1, resolution, resolution).expand(3, -1, -1, -1).clone()
    sketches[2].neg_()
    images = generator(sketches, torch.tensor([0, 1, 0]))
    assert images.shape == (3, 3, resolution, resolution)
    assert images.abs().max() <= 1
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("resolution", [16, 28, 40])
def test_the_critic_takes_every_resolution(resolution):
    critic = SketchDiscriminator(3, resolution=resolution, width=8)
    assert critic(torch.randn(2, 3, resolution, resolution), torch.tensor([0, 2])).shape == (2,)


def test_the_critic_sees_label_and_sketch():
    critic = SketchDiscriminator(3, resolution=16, width=8, sees_sketch=True)
    images = torch.randn(1, 4, 16, 16).expand(3, -1, -1, -1).clone()
    images[2, 3].neg_()
    first, other_label, other_sketch = critic(images, torch.tensor([0, 1, 0])).tolist()
    assert len({first, other_label, other_sketch}) == 3


def test_a_gradient_penalty_goes_through_the_instance_norm():
    critic = SketchDiscriminator(2, resolution=16, image_channels=1, width=8).double()
    labels, alpha = torch.tensor([0, 1]), torch.rand(2, 1, 1, 1, dtype=torch.float64)
    real, fake = torch.randn(2, 2, 1, 16, 16, dtype=torch.float64)
    weight = critic.head.weight

    def penalty():
        return gradient_penalty(lambda x: critic(x, labels), real, fake, alpha)

    (gradient,) = torch.autograd.grad(penalty(), weight)
    step = 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
        values.append(penalty().item())
        with torch.no_grad():
            weight[0, 0] -= sign * step
    assert gradient[0, 0].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="n_classes must be at least 1, got 0"):
        SketchGenerator(0)
    with pytest.raises(ValueError, match="label_channels must be at least 1"):
        SketchGenerator(2, label_channels=0)
    with pytest.raises(ValueError, match="sketch_channels must be at least 1"):
        SketchDiscriminator(2, sketch_channels=0)
    with pytest.raises(ValueError, match="resolution must be 4, 5, 6 or 7 times a power of two"):
        SketchGenerator(2, resolution=50)
    with pytest.raises(ValueError, match=r"sketches must have shape \(n, 1, 64, 64\)"):
        SketchGenerator(2, width=8)(torch.zeros(1, 3, 64, 64), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"images must have shape \(n, 4, 16, 16\)"):
        SketchDiscriminator(2, resolution=16, width=8, sees_sketch=True)(torch.zeros(1, 3, 16, 16), torch.tensor([0]))
