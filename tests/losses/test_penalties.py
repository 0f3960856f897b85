"""Penalties against closed forms and formulas; clipping."""

import pytest
import torch
from torch import nn

from fastgan.losses.penalties import LeCam, clip_weights_, gradient_penalty, r1_penalty

N, SHAPE = 6, (3, 5, 4)


def pair(dtype=torch.float64):
    real, fake = torch.randn(N, *SHAPE, dtype=dtype), torch.randn(N, *SHAPE, dtype=dtype)
    return real, fake, torch.rand(N, 1, 1, 1, dtype=dtype)


class Linear(nn.Module):
    """f(x) = <w, x>: its gradient is w everywhere."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.randn(SHAPE, dtype=dtype))

    def forward(self, x):
        return (x * self.w).sum((1, 2, 3))


@pytest.mark.parametrize("target", [1.0, 0.0])
def test_gradient_penalty_of_a_linear_critic(target):
    critic = Linear()
    penalty = gradient_penalty(critic, *pair(), target=target)
    norm = critic.w.detach().norm()
    torch.testing.assert_close(penalty.detach(), (norm - target) ** 2, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(penalty, critic.w)
    torch.testing.assert_close(gradient, 2 * (norm - target) * critic.w.detach() / norm, rtol=1e-12, atol=1e-14)


class Quadratic(nn.Module):
    """f(x) = a |x|^2 / 2: its gradient is a x, so the norm tells where the critic was asked."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        return self.a * x.square().flatten(1).sum(1) / 2


def test_gradient_penalty_is_taken_between_each_pair_with_its_own_alpha():
    critic, (real, fake, alpha) = Quadratic(), pair()
    between = (1 - alpha) * real + alpha * fake
    expected = ((0.7 * between.flatten(1).norm(dim=1) - 1) ** 2).mean()
    torch.testing.assert_close(gradient_penalty(critic, real, fake, alpha).detach(), expected, rtol=1e-12, atol=0)


def test_second_order_gradients_of_the_penalties():
    real, fake, alpha = pair()
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(60, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    names, values = zip(*hidden.named_parameters(), strict=True)

    def penalty(*weights):
        def critic(x):
            return torch.func.functional_call(hidden, dict(zip(names, weights, strict=True)), (x,))

        return gradient_penalty(critic, real, fake, alpha) + r1_penalty(critic, real)

    inputs = [v.detach().clone().requires_grad_(True) for v in values[:-1]]
    assert torch.autograd.gradcheck(lambda *w: penalty(*w, values[-1].detach()), inputs)


def test_a_flat_critic_has_a_finite_gradient():
    w = torch.zeros(SHAPE, requires_grad=True)
    real, fake, alpha = pair(torch.float32)
    penalty = gradient_penalty(lambda x: (x * w).sum((1, 2, 3)), real, fake, alpha)
    assert penalty.item() == pytest.approx(1, rel=1e-5)
    (gradient,) = torch.autograd.grad(penalty, w)
    assert gradient.isfinite().all()


def test_float32_even_under_autocast():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(60, 1))
    real, fake, alpha = pair(torch.float32)
    expected = gradient_penalty(critic, real, fake, alpha)
    seen = []
    critic[1].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient_penalty(critic, real, fake, alpha), expected)
        assert gradient_penalty(critic, real.bfloat16(), fake.bfloat16(), alpha).dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_nothing_flows_into_the_images():
    real, fake, alpha = (t.requires_grad_(True) for t in pair())
    penalty = gradient_penalty(Linear(), real, fake, alpha) + r1_penalty(Quadratic(), real)
    assert torch.autograd.grad(penalty, (real, fake, alpha), allow_unused=True) == (None, None, None)


def test_r1_matches_its_formula():
    real, critic = pair()[0], Quadratic()
    expected = (0.7 * real).square().flatten(1).sum(1).mean() / 2
    torch.testing.assert_close(r1_penalty(critic, real).detach(), expected, rtol=1e-12, atol=0)


def test_clip_weights():
    module = nn.Linear(50, 4)
    before = module.weight.detach().clone()
    clip_weights_(module, 0.05)
    assert torch.equal(module.weight, before.clamp(-0.05, 0.05))
    assert module.bias.abs().max() <= 0.05
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        clip_weights_(module, 0)


def test_bad_input():
    real, fake, alpha = pair()
    with pytest.raises(ValueError, match="fake must have the shape of real"):
        gradient_penalty(Linear(), real, fake[1:], alpha)
    with pytest.raises(ValueError, match=r"alpha must have shape \(6, 1, 1, 1\), one number per sample, got \(1,\)"):
        gradient_penalty(Linear(), real, fake, torch.rand(1))
    with pytest.raises(TypeError, match="alpha must be a torch.Tensor, got float"):
        gradient_penalty(Linear(), real, fake, 0.5)
    with pytest.raises(ValueError, match="real must have dtype"):
        r1_penalty(Linear(), real.long())


def test_lecam_keeps_logits_near_the_other_kinds_average():
    regularizer = LeCam(0.9)
    real, fake = torch.randn(2, 8, dtype=torch.float64).unbind()
    means = torch.zeros(2, dtype=torch.float64)
    for k in range(3):
        means = 0.9 * means + 0.1 * torch.stack([(real + k).mean(), (fake - k).mean()])
        expected = (real + k - means[1]).square().mean() + (fake - k - means[0]).square().mean()
        torch.testing.assert_close(regularizer(real + k, fake - k), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(regularizer.averages.double(), means, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        LeCam(1)
