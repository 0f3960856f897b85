"""Updates of any number of networks, clipped and accumulated gradients: equal to plain loops, eager and captured."""

import copy

import pytest
import torch
from torch import nn

from fastgan.backend import BackendWarning
from fastgan.losses import AdaptiveAugment
from fastgan.losses.noise import normal
from fastgan.losses.penalties import LeCam
from fastgan.training import LazyTerm, NetworkUpdate, TrainStep

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


@pytest.mark.parametrize("mode", MODES)
def test_two_updates_may_train_one_weight(mode):
    def trained(mode):
        nets = networks()
        g, _, q = nets.values()
        losses = (lambda b, _: g(b["x"][:, :4]).square().mean()), (lambda b, _: q(g(b["x"][:, :4])).mean())
        optimizers = [torch.optim.Adam(ps, 0.01) for ps in (g.parameters(), [*g.parameters(), *q.parameters()])]
        updates = {
            name: NetworkUpdate(loss, trains, optimizer, shares_weights=True)
            for name, trains, loss, optimizer in zip("ab", (["g"], ["g", "q"]), losses, optimizers, strict=True)
        }
        step = mode and TrainStep.of_updates(nets, updates, mode=mode, backend="eager")
        for i in range(4):
            for name, update in updates.items():
                if step:
                    step.update(name, batch(i))
                else:
                    update.optimizer.zero_grad()
                    update.loss(batch(i), {}).backward()
                    update.optimizer.step()
        assert not step or step.compilations == (2 if mode == "compile" else 0)
        return {name: network.state_dict() for name, network in nets.items()}

    torch.testing.assert_close(trained(mode), trained(None), rtol=1e-10, atol=1e-12)


def test_mistakes_are_named_before_anything_is_computed():
    step, nets, (d_loss, _), (optimizer, other) = info_gan("eager")
    before = copy.deepcopy(nets["d"].state_dict())
    for trains, held, message in (
        (["e"], other, r"updates\['d'\] must train some of g, d, q, got e"),
        (["q"], other, r"the optimizer of updates\['d'\] must hold weights of the q, it holds none"),
        (["g"], optimizer, r"must hold weights of the g alone, it has 4 others, of shapes \(8, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainStep.of_updates(nets, {"d": NetworkUpdate(d_loss, trains, held)})
    twice = {name: NetworkUpdate(d_loss, "d", torch.optim.SGD(nets["d"].parameters(), 0.1)) for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"updates\['b'\] and updates\['a'\] must not train one weight both, unless"):
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


@pytest.mark.parametrize("mode", MODES)
def test_lazy_terms_equal_a_plain_loop(mode):
    """R1 at every third update, times three; another penalty at every second; a graph for each choice of terms."""

    def penalty(batch, draws):
        x = batch["x"].detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        return gradient.square().sum(1).mean() / 2

    def shifted(batch, draws):
        return d(batch["x"] + draws["shift"].double()).square().mean()

    def loss(batch, draws):
        return d(batch["x"] * draws["z"].double()).mean()

    d = networks()["d"]
    optimizer = torch.optim.SGD(d.parameters(), 0.1)
    lazy = {"r1": LazyTerm(penalty, 3), "shifted": LazyTerm(shifted, 2, lambda n: {"shift": normal(n, 6)})}
    update = NetworkUpdate(loss, "d", optimizer, lambda n: {"z": normal(n, 6)}, lazy=lazy)
    rng = torch.Generator().manual_seed(3)
    step = TrainStep.of_updates({"d": d}, {"d": update}, mode=mode, backend="eager", rng=rng)
    names = [set(step.update("d", batch(i))) for i in range(8)]
    assert names[:4] == [{"loss", "r1", "shifted"}, {"loss"}, {"loss", "shifted"}, {"loss", "r1"}]
    assert step.compilations == (4 if mode == "compile" else 0)
    got, d = d.state_dict(), networks()["d"]
    optimizer, rng = torch.optim.SGD(d.parameters(), 0.1), torch.Generator().manual_seed(3)
    for i in range(8):
        draws = {"z": torch.randn(6, 6, generator=rng)}
        if i % 2 == 0:
            draws["shift"] = torch.randn(6, 6, generator=rng)
        total = loss(batch(i), draws)
        total = total + 3 * penalty(batch(i), draws) if i % 3 == 0 else total
        total = total + 2 * shifted(batch(i), draws) if i % 2 == 0 else total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    torch.testing.assert_close(got, d.state_dict(), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        LazyTerm(penalty, 0)
    with pytest.raises(ValueError, match="lazy must have terms of 'discriminator' and 'generator', got critic"):
        TrainStep(None, None, None, lazy={"critic": {}})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_lecam_in_a_captured_step(backend):
    """Its averages live outside the networks and move once per update."""
    results = []
    for mode in MODES:
        d, regularizer = networks()["d"], LeCam(0.9)

        def loss(batch, draws, d=d, regularizer=regularizer):
            real, fake = d(batch["x"]), d(batch["x"] * 2)
            return fake.mean() - real.mean() + 0.1 * regularizer(real, fake)

        update = NetworkUpdate(loss, "d", torch.optim.SGD(d.parameters(), 0.1))
        step = TrainStep.of_updates({"d": d}, {"d": update}, mode=mode, backend=backend)
        results.append([[step.update("d", batch(i)) for i in range(5)], d.state_dict(), regularizer.averages])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


class Scored(nn.Module):
    """A discriminator with an adaptive augmentation of its own."""

    def __init__(self):
        super().__init__()
        self.augment = AdaptiveAugment(("color", "translation"), target=-0.9, images=50)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 1))

    def forward(self, images):
        return self.net(images)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_adaptive_augmentation_in_a_captured_step(backend):
    results = []
    for mode in MODES:
        torch.manual_seed(0)
        d = Scored()

        def loss(batch, draws, d=d):
            logits = d(d.augment(batch["x"], draws))
            d.augment.adjust_(logits)
            return logits.square().mean()

        def draws(n, d=d):
            return d.augment.draws(n, 4, 4)

        update = NetworkUpdate(loss, "d", torch.optim.SGD(d.parameters(), 0.01), draws)
        rng = torch.Generator().manual_seed(1)
        step = TrainStep.of_updates({"d": d}, {"d": update}, mode=mode, backend=backend, rng=rng)
        images = [torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
        results.append([[step.update("d", {"x": x}) for x in images], d.state_dict()])
        assert step.compilations == (mode == "compile")
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert results[0][1]["augment.p"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_two_updates_on_one_batch_of_noise(mode):
    step, nets, _, _ = info_gan(mode)
    for i in range(4):
        terms = step.both(batch(i), first="d", second="g")
    assert terms.keys() == {"d/loss", "g/adversarial", "g/information"}
    got, (_, fresh, (d_loss, g_loss), (gq, d)) = {k: n.state_dict() for k, n in nets.items()}, info_gan("eager")
    rng = torch.Generator().manual_seed(1)
    for i in range(4):
        draws = {"z": torch.randn(6, 4, generator=rng)}
        for loss, optimizer in ((d_loss, d), (g_loss, gq)):
            optimizer.zero_grad()
            terms = loss(batch(i), draws)
            (sum(terms.values()) if isinstance(terms, dict) else terms).backward(
                inputs=[p for group in optimizer.param_groups for p in group["params"]]
            )
            optimizer.step()
    torch.testing.assert_close(got, {k: n.state_dict() for k, n in fresh.items()}, rtol=1e-10, atol=1e-12)
