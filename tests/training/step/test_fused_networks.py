"""Train steps of networks that ``fuse`` was called on, after their optimizers were made."""

import pytest
import torch
from torch import nn

from fastgan.losses.noise import normal
from fastgan.nn import SelfAttention2d, fuse
from fastgan.training import FunctionalGAN, TrainStep


class Block(nn.Module):
    """A block of other code whose softmax is over the queries."""

    def __init__(self, channels):
        super().__init__()
        self.query, self.key = (nn.Conv1d(channels, channels // 4, 1) for _ in range(2))
        self.value, self.gamma = nn.Conv1d(channels, channels, 1), nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x):
        f, g, h = (part(x.flatten(2)) for part in (self.query, self.key, self.value))
        return x + self.gamma * (h @ torch.softmax(f.transpose(1, 2) @ g, dim=1)).view_as(x)


def step(mode, fused):
    torch.manual_seed(0)
    norm = nn.utils.spectral_norm
    g = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (4, 4, 4)), Block(4), nn.Conv2d(4, 3, 1))
    d = nn.Sequential(norm(nn.Conv2d(3, 8, 1)), Block(8), nn.Flatten(), norm(nn.Linear(128, 1)))
    optimizers = [torch.optim.SGD(network.parameters(), 0.05) for network in (g, d)]
    if fused:
        for network in (g, d):
            fuse(network)
            assert any(isinstance(module, SelfAttention2d) for module in network.modules())

    def discriminator_loss(batch, draws):
        return d(g(draws["noise"]).detach()).square().mean() + (d(batch["images"]) - 1).square().mean()

    def generator_loss(batch, draws):
        return (d(g(draws["noise"])) - 1).square().mean()

    gan = FunctionalGAN(g, d, discriminator_loss, generator_loss, lambda n: {"noise": normal(n, 4)})
    return TrainStep(gan, *optimizers, mode=mode, backend="eager", rng=torch.Generator().manual_seed(1)), g, d


def run(mode, fused):
    train_step, g, d = step(mode, fused)
    for k in range(4):
        batch = {"images": torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(k))}
        train_step.discriminator(batch)
        train_step.generator(batch)
    return {**g.state_dict(prefix="g."), **d.state_dict(prefix="d.")}


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_fused_networks_train_as_the_originals(mode, recwarn):
    expected, actual = run("eager", False), run(mode, True)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert not [w for w in recwarn if "eager" in str(w.message)]  # nothing made the captured step fall back
