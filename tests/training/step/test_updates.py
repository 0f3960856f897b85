"""Updates of any number of networks, clipped and accumulated gradients: equal to plain loops, eager and captured."""

import copy

import pytest
import torch
from torch import nn

from fastgan.backend import BackendWarning
from fastgan.losses.noise import normal
from fastgan.training import NetworkUpdate, TrainStep

MODES = ["eager", "compile"]


def networks():
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    d = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))
    q = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 4))
    return {name: m.double() for name, m in (("g", g), ("d", d), ("q", q))}


def info_gan(mode, **options):
    """InfoGAN: the generator's update trains Q too."""
    nets = networks()
    g, d, q = nets.values()

    def d_loss(batch, draws):
        return d(g(draws["z"].double()).detach()).mean() - d(batch["x"]).square().mean()

    def g_loss(batch, draws):
        z = draws["z"].double()
        fake = g(z)
        return {"adversarial": -d(fake).mean(), "information": (q(fake) - z).square().mean()}

    optimizers = (
        torch.optim.SGD([*g.parameters(), *q.parameters()], 0.1, momentum=0.9),
        torch.optim.SGD(d.parameters(), 0.1),
    )

    def draws(n):
        return {"z": normal(n, 4)}

    step = TrainStep.of_updates(
        nets,
        {
            "d": NetworkUpdate(d_loss, "d", optimizers[1], draws, **options),
            "g": NetworkUpdate(g_loss, ["g", "q"], optimizers[0], draws, **options),
        },
        mode=mode,
        backend="eager",
        rng=torch.Generator().manual_seed(1),
    )
    return step, nets, (d_loss, g_loss), optimizers


def batch(i, n=6):
    return {"x": torch.randn(n, 6, generator=torch.Generator().manual_seed(i)).double()}


def by_hand(steps, clip=lambda parameters: None):
    """The same in a plain loop."""
    _, nets, losses, optimizers = info_gan("eager")
    rng = torch.Generator().manual_seed(1)
    for i in range(steps):
        for loss, optimizer in zip(losses, reversed(optimizers), strict=True):
            for network in nets.values():
                network.zero_grad()
            terms = loss(batch(i), {"z": torch.randn(6, 4, generator=rng)})
            (sum(terms.values()) if isinstance(terms, dict) else terms).backward()
            clip([p for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
    return {name: network.state_dict() for name, network in nets.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.3}, {"clip_grad_value": 0.05}, {"accumulate": 3}])
def test_three_networks_equal_a_plain_loop(mode, options):
    step, nets, _, _ = info_gan(mode, **options)
    for i in range(4):
        terms = step.update("d", batch(i)) | step.update("g", batch(i))
    assert terms.keys() == {"loss", "adversarial", "information"} | (
        {"grad_norm"} if "clip_grad_norm" in options else set()
    )
    assert step.compilations == (2 if mode == "compile" else 0)

    def clip(parameters):
        if norm := options.get("clip_grad_norm"):
            nn.utils.clip_grad_norm_(parameters, norm)
        if value := options.get("clip_grad_value"):
            nn.utils.clip_grad_value_(parameters, value)

    expected = by_hand(4, clip)
    got = {name: network.state_dict() for name, network in nets.items()}
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert not torch.equal(got["q"]["0.weight"], networks()["q"][0].weight)


def test_mistakes_are_named_before_anything_is_computed():
    step, nets, (d_loss, _), (optimizer, other) = info_gan("eager")
    before = copy.deepcopy(nets["d"].state_dict())
    for trains, held, message in (
        (["e"], other, r"updates\['d'\] must train some of g, d, q, got e"),
        (["q"], other, r"the optimizer of updates\['d'\] must hold weights of the q, it has none of them"),
        (["g"], optimizer, r"must hold weights of the g alone, it has 4 others, of shapes \(8, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainStep.of_updates(nets, {"d": NetworkUpdate(d_loss, trains, held)})
    twice = {name: NetworkUpdate(d_loss, "d", torch.optim.SGD(nets["d"].parameters(), 0.1)) for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"updates\['b'\] and updates\['a'\] must not train one weight both"):
        TrainStep.of_updates(nets, twice)
    with pytest.raises(ValueError, match="name must be one of 'd', 'g', got 'e'"):
        step.update("e", batch(0))
    step, nets, _, _ = info_gan("eager", accumulate=4)
    with pytest.raises(ValueError, match="accumulate must divide the batch, got 4 for 6 samples"):
        step.update("d", batch(0))
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        info_gan("eager", accumulate=0)
    with pytest.raises(ValueError, match="clip_grad_norm must be at least 0, got -1"):
        info_gan("eager", clip_grad_norm=-1)
    assert all(torch.equal(before[key], value) for key, value in nets["d"].state_dict().items())


def test_an_optimizer_of_another_kind_runs_eagerly():
    nets = networks()
    d = nets["d"]
    lion = torch.optim.NAdam(d.parameters(), 0.1)
    step = TrainStep.of_updates(
        nets, {"d": NetworkUpdate(lambda b, _: d(b["x"]).mean(), "d", lion)}, mode="compile", backend="eager"
    )
    with pytest.warns(BackendWarning, match="must be Adam, AdamW, RMSprop or SGD, got NAdam"):
        step.update("d", batch(0))
