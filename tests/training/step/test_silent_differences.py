"""A captured step equals the eager one, or runs eagerly and says why: hooks, attributes, closures, random numbers."""

import copy
import random
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastgan.backend import BackendWarning, warn_anew
from fastgan.losses.noise import normal
from fastgan.training import EMA, FunctionalGAN, TrainStep
from fastgan.training.step.snapshot import differing_terms

BACKENDS = ["eager", "aot_eager"]
SLOPE = 0.1


class Setup:
    """A small GAN in float64, and whatever a case changes in it."""

    def __init__(self, mode, backend, first=None):
        warn_anew.cache_clear()
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        self.g = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Unflatten(1, (3, 2, 2))).double()
        layers = [nn.Flatten(), nn.Linear(12, 5), nn.Softplus(), nn.Linear(5, 1)]
        self.d = nn.Sequential(nn.Identity() if first is None else first, *layers).double()
        self.sgd = [torch.optim.Adam(m.parameters(), 1e-2, eps=1e-3) for m in (self.g, self.d)]
        self.scale = lambda: 1.0
        self.mode, self.backend = mode, backend

    def loss(self, batch, draws):
        fake = self.g(draws["z"].double()).detach()
        return self.scale() * (self.d(fake).mean() - self.d(batch["images"]).square().mean())

    def make(self, **options):
        gan = FunctionalGAN(
            self.g,
            self.d,
            self.loss,
            lambda _, draws: -self.d(self.g(draws["z"].double())).mean(),
            lambda n: {"z": normal(n, 4)},
        )
        self.ema = EMA(self.g, 0.9)
        rng = torch.Generator().manual_seed(1)
        self.step = TrainStep(
            gan, *self.sgd, mode=self.mode, backend=self.backend, rng=rng, ema=self.ema, clip=0.5, **options
        )
        return self

    def run(self, i):
        images = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(i)).double()
        return self.step.discriminator({"images": images}) | self.step.generator({"images": images})

    def state(self):
        states = [o.state_dict()["state"] for o in self.sgd]
        return [
            self.g.state_dict(),
            self.d.state_dict(),
            self.ema.module.state_dict(),
            states,
            self.step.rng.get_state(),
            torch.get_rng_state(),
        ]


def same(prepare, between=lambda setup, i: None, steps=5, backend="eager", options=None):
    """Run eagerly and captured; check that nothing differs. Returns the warnings and the captured setup."""
    states = []
    for mode in ("eager", "compile"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            setup = prepare(mode, backend).make(**(options or {}))
            terms = []
            for i in range(steps):
                between(setup, i)
                terms.append(setup.run(i))
        states.append([terms, setup.state(), random.getstate(), np.random.get_state()[1]])  # noqa: NPY002
    torch.testing.assert_close(states[1][:2], states[0][:2], rtol=1e-7, atol=1e-9)
    assert states[1][2] == states[0][2]
    assert (states[1][3] == states[0][3]).all()
    return [str(w.message) for w in caught if issubclass(w.category, BackendWarning)], setup


class Center(nn.Module):
    """Puts a new buffer in the old one's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.mean[:, None, None]


class Scaled(nn.Module):
    """Reads a number from everywhere a module may keep one."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.config = {"power": [1.0]}

    def forward(self, x):
        return x * self.factor * self.config["power"][0] * SLOPE


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x / self.calls


class Draws(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        alpha = {"random": random.random, "numpy": np.random.rand, "none": lambda: 1.0}[self.kind]()
        return x * float(alpha)


class DrawsFromItsOwn(nn.Module):
    """Draws from a generator that it keeps."""

    KINDS: ClassVar = {
        "random": (lambda: random.Random(3), lambda rng: rng.random(), lambda rng: rng.getstate()),
        "numpy": (lambda: np.random.default_rng(3), lambda rng: rng.random(), lambda rng: rng.bit_generator.state),
        "torch": (
            lambda: torch.Generator().manual_seed(3),
            lambda rng: torch.rand((), generator=rng, dtype=torch.float64),
            lambda rng: rng.get_state().tolist(),
        ),
    }

    def __init__(self, kind):
        super().__init__()
        make, self.draw, self.read = self.KINDS[kind]
        self.rng = make()

    def forward(self, x):
        return x * (0.5 + self.draw(self.rng))


class Remembers(nn.Module):
    def forward(self, x):
        self.last = x.mean() if not hasattr(self, "last") else 0.5 * self.last.detach() + 0.5 * x.mean()
        return x - self.last


def OlderNorm():
    """Keeps the normed weight in an attribute."""
    return nn.utils.spectral_norm(nn.Conv2d(3, 3, 1))


class Keeps(nn.Module):
    """Writes an attribute in each forward and does not read it before."""

    def forward(self, x):
        self.last = 2 * x
        return self.last


class SetsData(nn.Module):
    """Spectral norm as public projects write it: each forward sets the data of frozen parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.u, self.v = (nn.Parameter(torch.randn(3), requires_grad=False) for _ in range(2))

    def forward(self, x):
        self.v.data = nn.functional.normalize(self.weight.t().mv(self.u), dim=0)
        self.u.data = nn.functional.normalize(self.weight.mv(self.v), dim=0)
        return torch.einsum("oi,nihw->nohw", self.weight / self.u.dot(self.weight.mv(self.v)), x)


class SetsDataOfAView(SetsData):
    """Its backward takes the old vector, of which a product with the weight has saved a view."""

    def forward(self, x):
        v = nn.functional.normalize(self.weight.t() @ self.u[None].t(), dim=0)
        self.u.data = nn.functional.normalize(self.weight @ v, dim=0)[:, 0]
        return torch.einsum("oi,nihw->nohw", self.weight / (self.u @ self.weight @ v), x)


class Dropped(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [Center, lambda: nn.BatchNorm2d(3), Scaled, OlderNorm, Keeps, SetsData])
def test_modules_that_are_captured(first, backend):
    told, setup = same(lambda mode, backend: Setup(mode, backend, first()), backend=backend)
    assert told == []
    assert setup.step.compilations == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DrawsFromItsOwn.KINDS)
def test_generators_of_modules_draw_as_often_as_in_an_eager_step(kind, backend):
    made = []

    def prepare(mode, backend):
        made.append(DrawsFromItsOwn(kind))
        return Setup(mode, backend, made[-1])

    told, _ = same(prepare, backend=backend)
    assert len(told) == 2 or kind == "torch"  # a graph may hold torch's
    first, second = (module.read(module.rng) for module in made)
    assert first == second


def test_a_module_that_draws_is_captured():
    told, _ = same(lambda mode, backend: Setup(mode, backend, Dropped()))
    assert told == []


@pytest.mark.parametrize(
    ("first", "named"),
    [
        (Counts, "discriminator.0.calls"),
        (Remembers, "discriminator.0.last"),
        (SetsDataOfAView, "optimizer.state[discriminator.0.weight].exp_avg"),
        (lambda: Draws("random"), "the state of Python's random"),
        (lambda: Draws("numpy"), "the state of numpy.random"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_modules_that_are_not_captured_are_reported(first, named, backend):
    told, setup = same(lambda mode, backend: Setup(mode, backend, first()), backend=backend)
    assert [message for message in told if "discriminator step runs eagerly" in message and named in message]
    values = [v for m in setup.d.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert not [v for v in values if type(v).__name__ == "FakeTensor"]


class StopsAtNan(nn.Module):
    """Reads its gradient in a hook of autograd."""

    def forward(self, x):
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(self.stop)
        return y

    @staticmethod
    def stop(gradient):
        if torch.isnan(gradient).any():
            raise ValueError("not a number")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_that_reads_a_value_is_reported(backend):
    first = nn.Sequential(nn.Conv2d(3, 3, 1), StopsAtNan())
    told, _ = same(lambda mode, backend: Setup(mode, backend, copy.deepcopy(first)), backend=backend)
    assert [message for message in told if "runs eagerly: it reads a tensor's value" in message]


def halve(parameter):
    parameter.grad.mul_(0.5)


def with_hook(kind):
    def prepare(mode, backend):
        setup = Setup(mode, backend)
        weight = setup.d[-1].weight
        if kind == "gradient":
            weight.register_hook(lambda gradient: 0.5 * gradient)
        if kind == "accumulated":
            weight.register_post_accumulate_grad_hook(halve)
        if kind == "before the step":
            setup.sgd[1].register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(setup.d.parameters(), 1e-3))
        if kind == "after the step":
            setup.sgd[1].register_step_post_hook(lambda *_: setup.d[-1].weight.data.clamp_(min=0))
        if kind == "another step":
            own = setup.sgd[1].step
            setup.sgd[1].step = lambda: (own(), own())
        return setup

    return prepare


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("gradient", None),
        ("accumulated", "weights have hooks"),
        ("before the step", "its optimizer has hooks"),
        ("after the step", "its optimizer has hooks"),
        ("another step", "step has been replaced"),
    ],
)
def test_hooks(kind, named):
    told, _ = same(with_hook(kind))
    assert len(told) == (named is not None)
    assert named is None or named in told[0]


def later(change, at=3):
    return lambda setup, i: change(setup) if i == at else None


def frozen(setup):
    setup.d[2].weight.requires_grad_(False)


def replaced_module(setup):
    setup.d[0] = nn.LeakyReLU(0.2)


def replaced_weight(setup):
    setup.d[2].weight = nn.Parameter(0.5 * setup.d[2].weight.detach())


def hooked_module(setup):
    setup.d[1].register_forward_hook(lambda module, args, output: 2 * output)


def hooked_weight(setup):
    setup.d[2].weight.register_hook(lambda gradient: 2 * gradient)


def closure(setup):
    setup.scale = lambda: 2.0


def standing_gradient(setup):
    setup.d[2].bias.grad = torch.ones_like(setup.d[2].bias)


def assigned(setup):
    setup.d.load_state_dict({k: 0.5 * v for k, v in setup.d.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (frozen, "the set of frozen weights"),
        (replaced_module, "discriminator._modules.0"),
        (replaced_weight, "discriminator.2._parameters.weight"),
        (hooked_module, "discriminator.1._forward_hooks"),
        (hooked_weight, "a hook of a weight"),
        (closure, "scale"),
        (standing_gradient, "gradients in .grad"),
        (assigned, "_parameters.weight"),
        (lambda setup: setup.d.eval(), "training"),
        (lambda setup: setup.sgd[1].param_groups[0].update(weight_decay=0.1), "its optimizer's options"),
        (lambda setup: setup.sgd[1].register_step_post_hook(lambda *_: None), "a hook"),
    ],
)
def test_later_changes_are_noticed(change, named):
    told, setup = same(Setup, later(change), steps=7)
    assert [message for message in told if "discriminator step runs eagerly" in message and named in message]
    assert setup.step.compilations <= 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m, i: setattr(m, "factor", 1.0 + i), "discriminator.0.factor"),
        (lambda m, i: m.config.__setitem__("power", [1.0 + i]), "discriminator.0.config.power"),
        (lambda m, i: m.config["power"].__setitem__(0, 1.0 + i), "discriminator.0.config.power"),
        (lambda m, i: setattr(Scaled, "factor", 1.0 + i), "Scaled.factor"),
        (lambda m, i: globals().__setitem__("SLOPE", 0.1 + i), "SLOPE"),
    ],
)
def test_numbers_that_change_at_each_step_are_read_anew(change, named, monkeypatch):
    monkeypatch.setattr(Scaled, "factor", 1.0)
    monkeypatch.setitem(globals(), "SLOPE", 0.1)
    told, setup = same(
        lambda mode, backend: Setup(mode, backend, Scaled()), lambda setup, i: change(setup.d[0], i), steps=6
    )
    assert [message for message in told if named in message]
    assert setup.step.compilations == 2  # no graph is made for a value that does not stay


def test_a_change_that_stays_is_captured_anew():
    def change(setup, i):
        if i == 3:
            setup.d[0].factor = 2.0

    told, setup = same(lambda mode, backend: Setup(mode, backend, Scaled()), change, steps=8)
    assert setup.step.compilations == 4
    assert len(told) == 2


def test_without_verification_a_counter_is_missed_and_with_it_not():
    """The two compared calls exist to find such differences."""
    with pytest.raises(AssertionError):
        same(lambda mode, backend: Setup(mode, backend, Counts()), options={"verify": False}, steps=1)
    same(lambda mode, backend: Setup(mode, backend, Counts()), steps=1)


def test_a_tensor_in_a_closure_is_an_input_of_the_graph():
    """One that is changed between steps needs no new graph; one that is read by Python is refused."""

    def prepare(mode, backend):
        setup = Setup(mode, backend)
        setup.p = torch.tensor(1.0, dtype=torch.float64)
        setup.scale = lambda: setup.p
        return setup

    told, setup = same(prepare, lambda setup, i: setup.p.fill_(1.0 + i))
    assert (told, setup.step.compilations) == ([], 2)

    def reading(mode, backend):
        setup = prepare(mode, backend)
        setup.scale = lambda: float(setup.p)
        return setup

    told, _ = same(reading, lambda setup, i: setup.p.fill_(1.0 + i))
    assert "it reads a tensor's value" in told[0]


def test_schedulers_do_not_complain():
    def prepare(mode, backend):
        setup = Setup(mode, backend)
        setup.schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in setup.sgd]
        return setup

    def between(setup, i):
        if i:
            for scheduler in setup.schedulers:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    scheduler.step()

    told, setup = same(prepare, between)
    assert (told, setup.step.compilations) == ([], 2)


CHANGES = {
    "eval": lambda s: s.d.eval(),
    "train": lambda s: s.d.train(),
    "freeze": frozen,
    "thaw": lambda s: s.d[2].weight.requires_grad_(True),
    "rate": lambda s: s.sgd[1].param_groups[0].update(lr=s.sgd[1].param_groups[0]["lr"] * 0.5),
    "replace": lambda s: s.d.__setitem__(3, nn.Softplus(beta=2.0)),
    "back": lambda s: s.d.__setitem__(3, nn.Softplus()),
    "load": lambda s: s.d.load_state_dict({k: v * 0.9 for k, v in s.d.state_dict().items()}),
    "attribute": lambda s: setattr(s.d[3], "threshold", 10.0 + s.d[3].threshold),
    "gradient": standing_gradient,
    "scale": closure,
    "hook": hooked_weight,
}
FEATURES = {
    "none": lambda: None,
    "center": Center,
    "norm": lambda: nn.BatchNorm2d(3),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)),
    "dropout": Dropped,
    "older norm": OlderNorm,
    "keeps": Keeps,
    "counts": Counts,
    "remembers": Remembers,
    "random": lambda: Draws("random"),
}


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(feature=st.sampled_from(sorted(FEATURES)), changes=st.lists(st.sampled_from(["", "", *CHANGES]), max_size=8))
def test_random_networks_and_changes(feature, changes):
    """Whatever is built and changed, a captured run ends in the eager run's state."""

    def between(setup, i):
        if i < len(changes) and changes[i]:
            CHANGES[changes[i]](setup)

    same(lambda mode, backend: Setup(mode, backend, FEATURES[feature]()), between, steps=len(changes) + 3)


def test_an_attribute_that_another_update_writes():
    """Not read by the discriminator's graph, it is no reason to run eagerly; read, it is."""

    def prepare(mode, backend):
        setup = Setup(mode, backend)
        setup.g = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 12)), *setup.g[1:]).double()
        setup.sgd[0] = torch.optim.Adam(setup.g.parameters(), 1e-2, eps=1e-3)
        return setup

    def loss_of_real_images(self, batch, draws):
        return self.d(batch["images"]).square().mean()

    def reading(self, batch, draws):
        return (self.d(batch["images"]) * self.g[0].weight.detach().sum()).square().mean()

    for loss, expected in ((loss_of_real_images, 0), (reading, 1)):

        def prepared(mode, backend, loss=loss):
            setup = prepare(mode, backend)
            setup.loss = loss.__get__(setup)
            return setup

        told, _ = same(prepared, steps=6)
        assert len(told) == expected


def test_terms_that_are_not_finite_are_compared():
    expected = {"a": torch.tensor(1.0), "b": torch.tensor(float("nan")), "c": torch.tensor(float("inf"))}
    assert differing_terms(dict(expected), expected, 1e-3) == []
    assert differing_terms(expected | {"a": torch.tensor(1.1)}, expected, 1e-3) == ["a"]
    assert differing_terms(expected | {"b": torch.tensor(1.0)}, expected, 1e-3) == ["b"]
    assert differing_terms(expected | {"c": torch.tensor(1e30)}, expected, 1e-3) == ["c"]
    nothing = {"a": torch.tensor(float("nan"))}
    assert differing_terms(dict(nothing), nothing, 1e-3) == []
