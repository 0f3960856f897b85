"""A train step whose critic has torch's own attention."""

import copy

import pytest
import torch
from torch import nn

from fastgan.losses.noise import normal
from fastgan.losses.penalties import r1_penalty
from fastgan.nn import second_order_attention
from fastgan.ops import _attention as attention_ops
from fastgan.training import FunctionalGAN, TrainStep


class Critic(nn.Module):
    """A critic of 8 tokens of 4 numbers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True)
        self.score = nn.Linear(4, 1)

    def forward(self, x):
        return self.score(self.encoder(x.unflatten(1, (8, 4)))).mean((1, 2))


def own_r1(critic, x):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.square().sum(1).mean() / 2


def train_step(mode, penalty=r1_penalty, generator=None, critic=None):
    g, d = generator or nn.Linear(3, 32), critic or Critic()

    def d_loss(batch, draws):
        fake = g(draws["z"]).detach()
        return {"adversarial": d(fake).mean() - d(batch["images"]).mean(), "r1": penalty(d, batch["images"])}

    def g_loss(batch, draws):
        return -d(g(draws["z"])).mean()

    gan = FunctionalGAN(g, d, d_loss, g_loss, lambda n: {"z": normal(n, 3)})
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (g, d)]
    return TrainStep(gan, *optimizers, mode=mode, backend="eager", rng=torch.Generator().manual_seed(0)), d


@pytest.mark.filterwarnings("error::fastgan.backend.BackendWarning")
def test_captured_steps_equal_eager_ones(monkeypatch):
    monkeypatch.setattr(attention_ops, "SMALL_MAPS", 0)
    networks, batch = (nn.Linear(3, 32), Critic()), {"images": torch.randn(5, 32)}
    (eager, d), (captured, other) = (train_step(m, r1_penalty, *copy.deepcopy(networks)) for m in ("eager", "compile"))
    for _ in range(4):
        with second_order_attention():
            losses = [step.discriminator(batch) | step.generator(batch) for step in (eager, captured)]
        assert losses[0]["r1"] > 0
        torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(other.state_dict(), d.state_dict())


@pytest.mark.parametrize("mode", ["eager", "compile"])
@pytest.mark.parametrize("penalty", [r1_penalty, own_r1])
@pytest.mark.filterwarnings("ignore::fastgan.backend.BackendWarning")
def test_without_it_the_error_names_the_cure(mode, penalty):
    step, _ = train_step(mode, penalty)
    with pytest.raises(RuntimeError, match=r"with fastgan.nn.second_order_attention\(\)") as caught:
        step.discriminator({"images": torch.randn(5, 32)})
    assert "is not implemented" in str(caught.value.__cause__)
