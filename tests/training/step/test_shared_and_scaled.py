"""Tensors that several updates share, and losses scaled for float16: equal to plain loops, eager and captured."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

from fastgan.backend import BackendWarning
from fastgan.losses.noise import normal
from fastgan.training import EMA, FunctionalGAN, LazyTerm, NetworkUpdate, TrainStep

MODES = [("eager", "eager"), ("compile", "eager"), ("compile", "aot_eager")]


def networks(drop=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(drop), nn.Tanh(), nn.Linear(8, 6)]
    g = nn.Sequential(*layers)
    d = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))
    return g.double(), d.double()


def images(i, n=6):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(i)).double()


def adam(module):
    return torch.optim.Adam(module.parameters(), 1e-2, (0.5, 0.9), eps=1e-3)


def shared_gan(g, d, calls=None):
    def shared(batch, draws):
        if calls is not None:
            calls.append(len(draws["z"]))
        return {"fake": g(draws["z"].double())}

    return FunctionalGAN(
        g,
        d,
        lambda batch, _: nn.functional.softplus(d(batch["fake"].detach())).mean() - d(batch["images"]).tanh().mean(),
        lambda batch, _: nn.functional.softplus(-d(batch["fake"])).mean(),
        lambda n: {"z": normal(n, 4)},
        shared,
    )


def plain_loop(steps, order=("d", "g"), drop=0.0, parts=1):
    """One forward of the generator per step, as published loops have it."""
    g, d = networks(drop)
    optimizers, ema, rng = {"g": adam(g), "d": adam(d)}, EMA(g, 0.9), torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    for i in range(steps):
        noise = torch.randn(6, 4, generator=rng).double()
        fakes, reals = [g(z) for z in noise.chunk(parts)], images(i).chunk(parts)
        for name in order:
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            for fake, real in zip(fakes, reals, strict=True):
                if name == "d":
                    loss = nn.functional.softplus(d(fake.detach())).mean() - d(real).tanh().mean()
                else:
                    loss = nn.functional.softplus(-d(fake)).mean()
                (loss / parts).backward()
            optimizers[name].step()
            if name == "g":
                ema.update(g)
    return [g.state_dict(), d.state_dict(), ema.module.state_dict()]


@pytest.mark.parametrize(("mode", "backend"), MODES)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip_grad_norm": 100.0}])
def test_one_fake_batch_for_both_updates(mode, backend, options):
    g, d = networks()
    calls = [] if mode == "eager" else None  # a graph runs no Python
    ema, rng = EMA(g, 0.9), torch.Generator().manual_seed(1)
    step = TrainStep(shared_gan(g, d, calls), adam(g), adam(d), mode=mode, backend=backend, ema=ema, rng=rng, **options)
    for i in range(5):
        terms = step.both({"images": images(i)})
    norms = {"discriminator/grad_norm", "generator/grad_norm"} if "clip_grad_norm" in options else set()
    assert terms.keys() == {"discriminator/loss", "generator/loss"} | norms
    assert step.counts == {"discriminator": 5, "generator": 5}
    parts = options.get("accumulate", 1)
    if mode == "eager":
        assert calls == [6 // parts] * 5 * parts
    else:
        assert step.compilations == 1
    expected = plain_loop(5, parts=parts)
    got = [g.state_dict(), d.state_dict(), ema.module.state_dict()]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("mode", "backend"), MODES)
def test_the_generator_first_and_dropout_in_it(mode, backend):
    """Both losses see images of one dropout mask."""
    g, d = networks(0.5)
    rng = torch.Generator().manual_seed(1)
    ema = EMA(g, 0.9)
    step = TrainStep(shared_gan(g, d), adam(g), adam(d), mode=mode, backend=backend, ema=ema, rng=rng)
    torch.manual_seed(5)
    for i in range(4):
        step.both({"images": images(i)}, first="generator", second="discriminator")
    got = [g.state_dict(), d.state_dict(), ema.module.state_dict()]
    torch.testing.assert_close(got, plain_loop(4, ("g", "d"), 0.5), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("mode", "backend"), MODES)
def test_separate_updates_generate_for_themselves(mode, backend):
    results = []
    for with_shared in (True, False):
        g, d = networks()
        gan = shared_gan(g, d)
        if not with_shared:
            make = gan.shared
            gan = FunctionalGAN(
                g,
                d,
                lambda b, z, d=d, make=make: (
                    nn.functional.softplus(d(make(b, z)["fake"].detach())).mean() - d(b["images"]).tanh().mean()
                ),
                lambda b, z, d=d, make=make: nn.functional.softplus(-d(make(b, z)["fake"])).mean(),
                lambda n: {"z": normal(n, 4)},
            )
        rng = torch.Generator().manual_seed(1)
        step = TrainStep(gan, adam(g), adam(d), mode=mode, backend=backend, rng=rng)
        for i in range(4):
            step.discriminator({"images": images(i)})
            step.generator({"images": images(i)})
        results.append([g.state_dict(), d.state_dict()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mode", "backend"), MODES)
def test_named_updates_share_tensors_and_have_lazy_terms(mode, backend):
    results = []
    for joint in (True, False):
        g, d = networks()
        lazy = {"size": LazyTerm(lambda batch, _: batch["fake"].square().mean(), 2)}
        updates = {
            "g": NetworkUpdate(
                lambda batch, _, d=d: -d(batch["fake"]).mean(), "g", adam(g), lambda n: {"z": normal(n, 4)}, lazy=lazy
            ),
            "d": NetworkUpdate(
                lambda batch, _, d=d: d(batch["fake"].detach()).mean() - d(batch["x"]).tanh().mean(), "d", adam(d)
            ),
        }
        if not joint:
            results.append(_shared_by_hand(g, d, updates))
            continue
        step = TrainStep.of_updates(
            {"g": g, "d": d},
            updates,
            shared=lambda _, draws, g=g: {"fake": g(draws["z"].double())},
            mode=mode,
            backend=backend,
            rng=torch.Generator().manual_seed(1),
        )
        names = [set(step.both({"x": images(i)}, first="g", second="d")) for i in range(5)]
        assert names[:2] == [{"g/loss", "g/size", "d/loss"}, {"g/loss", "d/loss"}]
        results.append([g.state_dict(), d.state_dict()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def _shared_by_hand(g, d, updates):
    rng = torch.Generator().manual_seed(1)
    for i in range(5):
        batch = {"x": images(i)}
        batch["fake"] = g(torch.randn(6, 4, generator=rng).double())
        for name in ("g", "d"):
            loss = updates[name].loss(batch, {})
            if name == "g" and i % 2 == 0:
                loss = loss + 2 * batch["fake"].square().mean()
            for module in (g, d):
                module.zero_grad()
            loss.backward()
            updates[name].optimizer.step()
    return [g.state_dict(), d.state_dict()]


def test_mistakes_with_shared_tensors():
    g, d = networks()
    step = TrainStep(shared_gan(g, d), adam(g), adam(d))
    with pytest.raises(ValueError, match="second must be another update than first, got 'generator' for both"):
        step.both({"images": images(0)}, first="generator", second="generator")
    with pytest.raises(ValueError, match="name must be one of 'discriminator', 'generator', got 'critic'"):
        step.both({"images": images(0)}, first="critic")
    updates = {
        "g": NetworkUpdate(lambda b, _: -d(b["fake"]).mean(), "g", adam(g), lambda n: {"z": normal(n, 4)}),
        "d": NetworkUpdate(lambda b, _: d(b["fake"]).mean(), "d", adam(d), accumulate=2),
    }
    step = TrainStep.of_updates({"g": g, "d": d}, updates, shared=lambda _, draws: {"fake": g(draws["z"].double())})
    with pytest.raises(ValueError, match="accumulate must be the same for updates that share tensors"):
        step.both({"x": images(0)}, first="g", second="d")


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2, eps=1e-3, amsgrad=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 1e-2, eps=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5, centered=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
}


def scaled(mode, backend, make, by_hand=False, **options):
    """A discriminator whose loss overflows at the third step. Returns its state, the scaler's and the terms."""
    _, d = networks()
    d = d.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizer = make(d.parameters())

    def loss(batch, _):
        return (d(batch["x"]).square().mean() * batch["factor"].mean()).float()

    batches = [
        {"x": images(i).float(), "factor": torch.full((6,), 1e38 if i == 2 else 1.0)} for i in range(6)
    ]  # 1e38 times the scale is infinite
    rows = []
    if by_hand:
        for batch in batches:
            optimizer.zero_grad()
            scaler.scale(loss(batch, {})).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(d.parameters(), options.get("clip_grad_norm", float("inf")))
            scaler.step(optimizer)
            scaler.update()
    else:
        update = NetworkUpdate(loss, "d", optimizer, scaler=scaler, **options)
        step = TrainStep.of_updates({"d": d}, {"d": update}, mode=mode, backend=backend)
        rows = [step.update("d", batch) for batch in batches]
        assert step.compilations == (1 if mode == "compile" else 0)
    return [
        d.state_dict(),
        scaler.state_dict(),
        [float(s["step"]) for s in optimizer.state.values() if "step" in s],
    ], rows


@pytest.mark.parametrize(("mode", "backend"), MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_losses_equal_a_plain_loop(name, mode, backend):
    got, rows = scaled(mode, backend, OPTIMIZERS[name])
    expected, _ = scaled(mode, backend, OPTIMIZERS[name], by_hand=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert got[1]["scale"] == 1024.0 * 2 / 2 * 2  # grown after two steps, halved at the overflow, grown again
    assert float(rows[0]["loss"]) < 100  # not scaled


@pytest.mark.parametrize(("mode", "backend"), MODES)
def test_scaled_gradients_are_clipped_after_they_are_unscaled(mode, backend):
    got, rows = scaled(mode, backend, OPTIMIZERS["sgd"], clip_grad_norm=0.1)
    expected, _ = scaled(mode, backend, OPTIMIZERS["sgd"], by_hand=True, clip_grad_norm=0.1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not rows[2]["grad_norm"].isfinite()


@pytest.mark.parametrize(("mode", "backend"), MODES)
def test_one_scaler_for_two_updates_that_share_tensors(mode, backend):
    results = []
    for by_hand in (False, True):
        g, d = (m.float() for m in networks())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        optimizers, rng = [adam(g), adam(d)], torch.Generator().manual_seed(1)
        gan = FunctionalGAN(
            g,
            d,
            lambda batch, _, d=d: d(batch["fake"].detach()).mean() - d(batch["images"]).tanh().mean(),
            lambda batch, _, d=d: -d(batch["fake"]).mean(),
            lambda n: {"z": normal(n, 4)},
            lambda _, draws, g=g: {"fake": g(draws["z"])},
        )
        if not by_hand:
            step = TrainStep(gan, *optimizers, mode=mode, backend=backend, rng=rng, scaler=scaler)
        for i in range(4):
            batch = {"images": images(i).float()}
            if not by_hand:
                step.both(batch)
                continue
            batch["fake"] = g(torch.randn(6, 4, generator=rng))
            for loss, optimizer in ((gan._discriminator_loss, optimizers[1]), (gan._generator_loss, optimizers[0])):
                g.zero_grad(), d.zero_grad()
                scaler.scale(loss(batch, {})).backward()
                scaler.step(optimizer)
                scaler.update()
        results.append([g.state_dict(), d.state_dict(), scaler.state_dict()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert results[0][2]["scale"] == 16.0


def test_a_changed_scaler_gets_another_graph_or_runs_eagerly():
    _, d = networks()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    update = NetworkUpdate(lambda b, _: d(b["x"]).square().mean(), "d", adam(d), scaler=scaler)
    step = TrainStep.of_updates({"d": d}, {"d": update}, mode="compile", backend="eager")
    for i in range(3):
        step.update("d", {"x": images(i)})
    scaler.set_growth_interval(4)
    with pytest.warns(BackendWarning, match="its gradient scaler's options has changed since the capture"):
        step.update("d", {"x": images(3)})
    assert scaler.get_scale() == 16.0


def test_a_disabled_scaler_changes_nothing():
    states = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        _, d = networks()
        update = NetworkUpdate(lambda b, _, d=d: d(b["x"]).square().mean(), "d", adam(d), scaler=scaler)
        step = TrainStep.of_updates({"d": d}, {"d": update})
        step.update("d", {"x": images(0)})
        states.append(copy.deepcopy(d.state_dict()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


class Rounding(torch.fx.Interpreter):
    """Rounds every result of a graph anew, as a compiler that fuses loops does."""

    def run_node(self, node):
        result = super().run_node(node)
        if not isinstance(result, torch.Tensor) or not result.is_floating_point() or node.op != "call_function":
            return result
        if any(alias in str(node.target) for alias in ("_.", "view", "detach", "alias", "unsqueeze", "aten.t.")):
            return result
        noise = torch.rand(result.shape, generator=self.rng, dtype=torch.float64).mul_(2).sub_(1)
        return result + (noise * torch.finfo(result.dtype).eps * result.abs()).to(result.dtype)


def rounding(graph, arguments, seed=2):
    interpreter = Rounding(graph)
    interpreter.rng = torch.Generator().manual_seed(seed)
    return interpreter.run


@pytest.mark.parametrize("make", [adam, lambda m: torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9)])
def test_gradients_that_are_rounding_noise_do_not_refuse_a_graph(make):
    """The bias before batch norm has a gradient of zero but for rounding."""
    g, d = networks()
    step = TrainStep(shared_gan(g, d), make(g), make(d), mode="compile", backend=rounding, ema=EMA(g, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        for i in range(4):
            step.both({"images": images(i)})
            step.generator({"images": images(i)})
    assert step.compilations == 2


@pytest.mark.parametrize("seed", range(6))
def test_averages_of_weights_whose_gradients_are_rounding_noise_do_not_refuse_a_graph(seed):
    """Adam makes full steps of such gradients, to one side or the other, and the average follows them."""
    g, d = networks()
    optimizers = (torch.optim.Adam(m.parameters(), 1e-2, (0.5, 0.9), eps=1e-30) for m in (g, d))
    backend = functools.partial(rounding, seed=seed)
    step = TrainStep(shared_gan(g, d), *optimizers, mode="compile", backend=backend, ema=EMA(g, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        for i in range(3):
            step.both({"images": images(i)})
    assert step.compilations == 1
