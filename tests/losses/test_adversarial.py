"""Every loss against its formula, in float64 and in the dtypes it is used in."""

import math

import pytest
import torch

from fastgan.losses.adversarial import LOSSES, auxiliary_class_loss, gan_loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mean(f, values):
    return sum(map(f, values)) / len(values)


FORMULAS = {
    "hinge": (
        lambda real, fake: mean(lambda r: max(0, 1 - r), real) + mean(lambda f: max(0, 1 + f), fake),
        lambda fake: -mean(lambda f: f, fake),
    ),
    "non-saturating": (
        lambda real, fake: -mean(lambda r: math.log(sigmoid(r)), real) - mean(lambda f: math.log(sigmoid(-f)), fake),
        lambda fake: -mean(lambda f: math.log(sigmoid(f)), fake),
    ),
    "saturating": (
        lambda real, fake: -mean(lambda r: math.log(sigmoid(r)), real) - mean(lambda f: math.log(sigmoid(-f)), fake),
        lambda fake: mean(lambda f: math.log(sigmoid(-f)), fake),
    ),
    "wasserstein": (
        lambda real, fake: mean(lambda f: f, fake) - mean(lambda r: r, real),
        lambda fake: -mean(lambda f: f, fake),
    ),
    "least-squares": (
        lambda real, fake: mean(lambda r: (r - 1) ** 2, real) / 2 + mean(lambda f: f**2, fake) / 2,
        lambda fake: mean(lambda f: (f - 1) ** 2, fake) / 2,
    ),
    "relativistic": (
        lambda real, fake: -mean(lambda pair: math.log(sigmoid(pair[0] - pair[1])), list(zip(real, fake, strict=True))),
        lambda fake: -mean(lambda pair: math.log(sigmoid(pair[1] - pair[0])), list(zip(REAL, fake, strict=True))),
    ),
}
REAL = [-3.0, -0.5, 0.0, 0.75, 1.5, 4.0, 12.0]
FAKE = [-8.0, -1.5, -0.25, 0.5, 3.0, 0.0, 2.0]


def generator_loss(loss, fake, real=None):
    """Return the generator's loss of fake logits, beside equally many real ones if the loss compares them."""
    real = torch.tensor(REAL, dtype=fake.dtype) if real is None else real
    return loss.generator(real, fake) if loss.is_paired else loss.generator(fake)


def test_every_loss_has_a_formula_here():
    assert set(FORMULAS) == set(LOSSES)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_matches_formula(name, dtype, rtol):
    # The logits are exact in all four dtypes: half precision, computed in float32, must reach float32's error.
    real, fake = torch.tensor(REAL, dtype=dtype), torch.tensor(FAKE, dtype=dtype)
    loss = gan_loss(name)
    discriminator, generator = FORMULAS[name]
    assert loss.discriminator(real, fake).item() == pytest.approx(discriminator(REAL, FAKE), rel=rtol)
    assert generator_loss(loss, fake).item() == pytest.approx(generator(FAKE), rel=rtol)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients(name):
    real = torch.tensor(REAL, dtype=torch.float64, requires_grad=True)
    fake = torch.tensor(FAKE, dtype=torch.float64, requires_grad=True)
    loss = gan_loss(name)
    assert torch.autograd.gradcheck(loss.discriminator, (real, fake))
    assert torch.autograd.gradcheck(lambda x: generator_loss(loss, x, real.detach()), (fake,))


@pytest.mark.parametrize("name", FORMULAS)
def test_extreme_logits_stay_finite(name):
    logits = torch.tensor([-1e4, 1e4])
    loss = gan_loss(name)
    assert loss.discriminator(logits, logits).isfinite()
    assert generator_loss(loss, logits, logits.flip(0)).isfinite()


@pytest.mark.parametrize("name", FORMULAS)
def test_any_layout(name):
    loss = gan_loss(name)
    grid = torch.randn(6, 10, dtype=torch.float64)
    strided = grid[::2, 1::3]
    assert not strided.is_contiguous()
    flat = strided.flatten().clone()
    got, expected = generator_loss(loss, strided, grid[:3, :3]), generator_loss(loss, flat, grid[:3, :3].flatten())
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


def test_a_wrong_sign_shows():
    good, bad = torch.full((4,), 0.5), torch.full((4,), -0.5)
    for loss in LOSSES.values():
        assert loss.discriminator(good, bad) < loss.discriminator(bad, good)
        assert generator_loss(loss, good, bad) < generator_loss(loss, bad, good)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_auxiliary_class_loss_matches_its_formula(dtype):
    rows, labels = [[1.0, -2.0, 0.5], [30.0, 0.0, -4.0]], [2, 1]
    expected = mean(
        lambda pair: math.log(sum(map(math.exp, pair[0]))) - pair[0][pair[1]], list(zip(rows, labels, strict=True))
    )
    loss = auxiliary_class_loss(torch.tensor(rows, dtype=dtype), torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="labels must have dtype int64"):
        auxiliary_class_loss(torch.zeros(2, 3), torch.zeros(2))


def test_bad_input():
    with pytest.raises(ValueError, match="loss must be one of 'hinge'"):
        gan_loss("hing")
    with pytest.raises(ValueError, match="fake must have dtype"):
        gan_loss("hinge").generator(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="real must hold at least one"):
        gan_loss("hinge").discriminator(torch.ones(0), torch.ones(3))
