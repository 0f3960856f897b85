"""Captured steps: equal to eager ones in every tensor, one compilation, and a way out where capture fails."""

import copy
import importlib
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastgan.backend import BackendWarning, warn_once
from fastgan.data import edge_map
from fastgan.draws import normal, uniform
from fastgan.nn import SelfAttention2d, group_spectral_norm
from fastgan.recipes import available, load_recipe
from fastgan.regularisers import gradient_penalty
from fastgan.training import EMA, Objective, OwnGan, RecipeGan, TrainStep, build_networks
from fastgan.training.capture import Update
from fastgan.training.optimizer_state import OptimizerState
from fastgan.training.optimizers import make_optimizer
from tests.training.test_loop import trainer

STEPS = 5
N = 6
SYSTEMS = [name for name in available() if not name.endswith("-digits")]

# The graph holds the same kernels, so on the "eager" backend only sums of gradients may differ in their order; Inductor
# rounds otherwise within its fused loops, and five steps of Adam at learning rate 1e-3 carry that on.
TOLERANCE = {"eager": 1e-5, "inductor": 2e-4}


@pytest.fixture(autouse=True)
def fresh_warnings():
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


class Setup:
    """A recipe's GAN, narrow and at 16x16, with optimisers and average, in either mode."""

    def __init__(self, name, mode, backend="eager", device="cpu", autocast=None, impl="reference", **objective):
        recipe = load_recipe(name)
        attention = min(recipe.model.attention_resolution, 8)
        small = {"resolution": 16, "generator_width": 8, "discriminator_width": 8, "attention_resolution": attention}
        torch.manual_seed(0)
        networks = build_networks(replace(recipe.model, **small), 3, 1)
        g, d = (network.to(device).to(memory_format=torch.channels_last) for network in networks)
        for module in (*g.modules(), *d.modules()):
            if isinstance(module, SelfAttention2d):
                nn.init.constant_(module.gamma, 0.5)
                # "reference" is the op, where "auto" would take plain PyTorch for maps as small as these.
                module.impl = impl
        self.optimizer_g = make_optimizer(g, 1e-3, recipe.train)
        self.optimizer_d = make_optimizer(d, 1e-3, recipe.train)
        for group in (*self.optimizer_g.param_groups, *self.optimizer_d.param_groups):
            group["eps"] = 1e-3  # 1e-8 makes full steps of the rounding of gradients that are zero
        self.ema = EMA(g, 0.9)
        self.gan = RecipeGan(g, d, replace(Objective.of(recipe.train), **objective), autocast=autocast)
        self.rng = torch.Generator(device).manual_seed(3)
        self.step = TrainStep(
            self.gan,
            self.optimizer_g,
            self.optimizer_d,
            mode=mode,
            backend=backend,
            ema=self.ema,
            clip=recipe.train.clip,
            rng=self.rng,
        )

    def run(self, steps=STEPS, device="cpu"):
        for k in range(steps):
            self.step.discriminator(batch(k, device=device))
            self.step.generator(batch(k, device=device))
        return self

    def state(self):
        modules = {"g": self.gan.generator, "d": self.gan.discriminator, "ema": self.ema.module}
        state = {f"{n}.{key}": value for n, module in modules.items() for key, value in module.state_dict().items()}
        for name, optimizer in (("optimizer_g", self.optimizer_g), ("optimizer_d", self.optimizer_d)):
            for i, entries in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{i}.{key}": value for key, value in entries.items() if value is not None}
        return state | {"updates": self.ema.updates, "rng": self.rng.get_state()}


def batch(k, n=N, device="cpu"):
    rng = torch.Generator().manual_seed(k)
    images = (torch.rand(n, 1, 16, 16, generator=rng) * 2 - 1).contiguous(memory_format=torch.channels_last)
    made = {"images": images, "labels": torch.arange(n) % 3, "sketches": edge_map(images)}
    return {name: value.to(device) for name, value in made.items()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def assert_equal_after_steps(name, backend, **options):
    eager, captured = (Setup(name, mode, backend, **options) for mode in ("eager", "compile"))
    start = {key: value.clone() for key, value in captured.state().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        captured.run()
    eager.run()
    assert largest_difference(captured.state(), eager.state()) < TOLERANCE[backend]
    assert captured.step.compilations == 2  # one a network, none after the first step
    moved = [key for key, value in captured.state().items() if key in start and not torch.equal(start[key], value)]
    for part in ("g.", "d.", "ema.", "updates", "rng"):
        assert any(key.startswith(part) for key in moved), part


@pytest.mark.parametrize("name", SYSTEMS)
def test_five_captured_steps_equal_eager_ones(name):
    assert_equal_after_steps(name, "eager")


def test_a_broken_double_backward_is_found(monkeypatch):
    """The graph's ``attention_bwd_bwd`` gets the sign of one cotangent wrong: the states must differ."""
    attention_ops = importlib.import_module("fastgan.ops.attention")
    right = attention_ops.attention_bwd_bwd_op
    eager, captured = (Setup("sagan", mode, gradient_penalty=10.0) for mode in ("eager", "compile"))
    eager.step.discriminator(batch(0))
    monkeypatch.setattr(attention_ops, "attention_bwd_bwd_op", lambda ggq, *rest: right(-ggq, *rest))
    captured.step.discriminator(batch(0))
    assert captured.step.compilations == 1
    assert largest_difference(captured.state(), eager.state()) > TOLERANCE["inductor"]


def test_bfloat16_leaves_weights_state_and_penalty_in_float32():
    options = {"autocast": torch.bfloat16, "gradient_penalty": 10.0}
    captured, eager = (Setup("sagan", mode, **options) for mode in ("compile", "eager"))
    for k in range(2):
        eager.step.discriminator(batch(k))
        captured.step.discriminator(batch(k))
    assert largest_difference(captured.state(), eager.state()) < TOLERANCE["eager"]
    networks = (captured.gan.generator, captured.gan.discriminator)
    assert all(p.dtype == torch.float32 for network in networks for p in network.parameters())
    nodes = traced(captured, "discriminator").graph.nodes
    dtypes = {first_value(n).dtype for n in nodes if n.target == torch.ops.aten.convolution.default}
    assert dtypes == {torch.bfloat16, torch.float32}  # the passes on images, and the penalty


def traced(setup, name):
    optimizer = setup.optimizer_d if name == "discriminator" else setup.optimizer_g
    update = Update(setup.gan, name, optimizer, ema=setup.ema if name == "generator" else None)
    draws = {
        key: spec.make(torch.Generator(), "cpu") for key, spec in getattr(setup.gan, f"{name}_draws")(batch(0)).items()
    }
    return update.trace(batch(0), draws).graph


def first_value(node):
    value = node.meta["val"]
    return value[0] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", ["discriminator", "generator"])
def test_maps_keep_their_layout_through_a_captured_step(name):
    """Layouts change where maps of 4x4 are read from, or as, the vectors of a linear layer, and nowhere else."""
    copies = []
    for node in traced(Setup("sagan", "eager"), name).graph.nodes:
        if node.target in (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default):
            value, source = first_value(node), first_value(node.args[0])
            if value.ndim == 4 and value.stride() != source.stride():
                copies.append(tuple(value.shape[2:]))
    assert copies == ([(4, 4)] if name == "generator" else [])


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.5, 0.9), weight_decay=0.1, amsgrad=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.9), fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, weight_decay=0.1, centered=True),
    "rmsprop, plain": lambda p: torch.optim.RMSprop(p, 1e-3),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd, plain": lambda p: torch.optim.SGD(p, 1e-2),
}


def own_gan(make_optimizer, mode, loss=None):
    """Two modules and two losses, as a user brings them."""
    torch.manual_seed(1)
    g = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Tanh()).double()
    d = group_spectral_norm(nn.Sequential(nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1)).double())

    def critic_loss(batch, draws):
        real, fake = batch["images"], g(draws["z"].double()).detach()
        penalty = gradient_penalty(d, real, fake, draws["alpha"].double())
        return {"adversarial": d(fake).mean() - d(real).mean(), "penalty": 10 * penalty}

    gan = OwnGan(
        g, d, loss or critic_loss, lambda _, draws: -d(g(draws["z"].double())).mean(),
        draws=lambda n: {"z": normal(n, 4), "alpha": uniform(n, 1)},
    )  # fmt: skip
    optimizers = make_optimizer(g.parameters()), make_optimizer(d.parameters())
    return TrainStep(gan, *optimizers, mode=mode, backend="eager", rng=torch.Generator().manual_seed(0)), optimizers


def vectors(k, n=5):
    return {"images": torch.randn(n, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64)}


def steps(step, ks, n=5):
    return [(step.discriminator(vectors(k, n)), step.generator(vectors(k, n))) for k in ks]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_optimisers_have_the_numbers_and_state_dicts_of_torch(name, dtype):
    def parameters():
        torch.manual_seed(2)
        return [nn.Parameter(torch.randn(s, dtype=dtype).contiguous(memory_format=f)) for s, f in shapes]

    shapes = [((4, 3, 2, 2), torch.channels_last), ((5,), torch.contiguous_format)]
    theirs, ours = parameters(), parameters()
    optimizer, same = OPTIMIZERS[name](theirs), OPTIMIZERS[name](ours)
    state = OptimizerState(same, ours)
    for _ in range(3):
        gradients = [torch.randn(shape, dtype=dtype) for shape, _ in shapes]  # channels-first, whatever the weights are
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = torch.empty_like(p).copy_(g)
        optimizer.step()
        state.refresh()
        with torch.no_grad():
            traced = {id(p): p for p in ours}
            state.update(traced, dict(zip(traced, gradients, strict=True)), state.tensors(), state.rates)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(ours, theirs, **tolerance)
    got, expected = ([{k: v for k, v in s.items() if v is not None} for s in o.state_dict()["state"].values()]
                     for o in (same, optimizer))  # fmt: skip
    torch.testing.assert_close(got, expected, **tolerance)


def moments(optimizers):
    states = [entries for o in optimizers for entries in o.state_dict()["state"].values()]
    return [entries[key] for entries in states for key in sorted(entries) if entries[key] is not None]


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_a_run_moves_between_modes_at_a_checkpoint(name):
    """Three steps in one mode, state dicts, three in the other; the rate changes on the way, nothing is recompiled."""
    results = {}
    for modes in (("eager", "eager"), ("eager", "compile"), ("compile", "eager"), ("compile", "compile")):
        step, optimizers = own_gan(OPTIMIZERS[name], modes[0])
        steps(step, range(3))
        saved = [copy.deepcopy(o.state_dict()) for o in optimizers], step.rng.get_state()
        networks = [copy.deepcopy(m.state_dict()) for m in (step.gan.generator, step.gan.discriminator)]
        if modes[0] != modes[1]:
            step, optimizers = own_gan(OPTIMIZERS[name], modes[1])
        for optimizer, state in zip(optimizers, saved[0], strict=True):
            optimizer.load_state_dict(state)
            optimizer.param_groups[0]["lr"] *= 3
        for module, state in zip((step.gan.generator, step.gan.discriminator), networks, strict=True):
            module.load_state_dict(state)
        step.rng.set_state(saved[1])
        terms = steps(step, range(3, 6))[-1]
        assert step.compilations == (2 if modes[1] == "compile" else 0)
        weights = [p for m in (step.gan.generator, step.gan.discriminator) for p in m.state_dict().values()]
        results[modes] = [*weights, *moments(optimizers), *terms[0].values(), *terms[1].values()]
    expected = results.pop(("eager", "eager"))
    for got in results.values():
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones_with_attention_spectral_and_batch_norm_and_penalty():
    """Through Inductor. Adam's eps is large: 1e-8 makes full steps of the rounding of gradients that are zero."""

    def build(mode):
        torch.manual_seed(1)
        g = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 64), nn.Unflatten(1, (1, 8, 8)))
        attention = SelfAttention2d(8, impl="reference")
        nn.init.constant_(attention.gamma, 0.5)
        body = nn.Conv2d(1, 8, 4, 2, 1), nn.Softplus(), attention, nn.Flatten(), nn.Linear(128, 1)
        d = group_spectral_norm(nn.Sequential(*body))

        def critic_loss(batch, draws):
            real, fake = batch["images"], g(draws["z"]).detach()
            penalty = gradient_penalty(d, real, fake, draws["alpha"])
            return d(fake).mean() - d(real).mean() + 10 * penalty

        gan = OwnGan(
            g, d, critic_loss, lambda _, draws: -d(g(draws["z"])).mean(),
            draws=lambda n: {"z": normal(n, 4), "alpha": uniform(n, 1, 1, 1)},
        )  # fmt: skip
        optimizers = [torch.optim.Adam(m.parameters(), 1e-2, (0.0, 0.9), eps=1e-3) for m in (g, d)]
        rng = torch.Generator().manual_seed(0)
        return TrainStep(gan, *optimizers, mode=mode, rng=rng), optimizers

    states = []
    for mode in ("eager", "compile"):
        step, optimizers = build(mode)
        for k in range(STEPS):
            real = {"images": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(k))}
            step.discriminator(real)
        networks = (step.gan.generator, step.gan.discriminator)
        states.append([v for m in networks for v in m.state_dict().values()] + moments(optimizers[1:]))
    assert step.compilations == 1
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)


def test_an_odd_last_batch_and_eval_mode_run_eagerly_on_the_same_state():
    captured, eager = (own_gan(OPTIMIZERS["adam"], mode)[0] for mode in ("compile", "eager"))
    steps(captured, range(2))
    with pytest.warns(BackendWarning, match="discriminator step runs eagerly: its batch"):
        steps(captured, [2], n=3)
    captured.gan.generator.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(captured, [3])
        captured.gan.generator.train()
        got = steps(captured, [4])
    assert captured.compilations == 2
    steps(eager, range(2))
    steps(eager, [2], n=3)
    eager.gan.generator.eval()
    steps(eager, [3])
    eager.gan.generator.train()
    torch.testing.assert_close(got, steps(eager, [4]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make_optimizer", "mode", "reads", "reason"),
    [
        (OPTIMIZERS["adam"], "cudagraph", False, "CUDA graphs need a CUDA device, the generator is on cpu"),
        (torch.optim.NAdam, "compile", False, "optimiser must be Adam, AdamW, RMSprop or SGD, got NAdam"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.1, dampening=0.1), "compile", False, "SGD with dampening"),
        (OPTIMIZERS["adam"], "compile", True, "data-dependent|_local_scalar_dense|item"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_what_cannot_be_captured_runs_eagerly_with_one_reason(make_optimizer, mode, reads, reason):
    def loss(batch, draws):
        score = step.gan.discriminator(batch["images"]).mean()
        return score * 2 if reads and score.item() > 0 else score

    step, _ = own_gan(make_optimizer, mode, loss)
    with pytest.warns(BackendWarning, match=f"discriminator step runs eagerly: .*({reason})") as caught:
        results = steps(step, range(3))
    assert len([w for w in caught if "discriminator" in str(w.message)]) == 1
    eager, _ = own_gan(make_optimizer, "eager", loss)
    step = eager
    torch.testing.assert_close(results, steps(eager, range(3)), rtol=1e-9, atol=1e-12)


def test_a_failing_compiler_leaves_an_eager_step_with_the_same_draws():
    def loss(batch, draws):
        return step.gan.discriminator(batch["images"] + draws["z"].mean()).mean()

    @torch._dynamo.register_backend(name="fastgan_test_failing")
    def failing(module, inputs):
        raise RuntimeError("no compiler here")

    step, _ = own_gan(OPTIMIZERS["adam"], "compile", loss)
    step.backend = "fastgan_test_failing"
    with pytest.warns(BackendWarning, match="discriminator step runs eagerly: .*"):
        results = steps(step, range(3))
    assert step.compilations == 0
    step, _ = own_gan(OPTIMIZERS["adam"], "eager", loss)
    torch.testing.assert_close(results, steps(step, range(3)), rtol=0, atol=0)


def test_a_wrong_loss_fails_as_it_does_eagerly():
    step, _ = own_gan(OPTIMIZERS["adam"], "compile", lambda batch, draws: batch["absent"])
    with pytest.warns(BackendWarning), pytest.raises(KeyError, match="absent"):
        step.discriminator(vectors(0))
    with pytest.raises(ValueError, match="mode must be one of 'eager', 'compile', 'cudagraph', got 'fast'"):
        own_gan(OPTIMIZERS["adam"], "fast")


def test_the_trainer_captures_where_it_is_told_to_and_goes_on_from_an_eager_checkpoint():
    eager = trainer(n_critic=2, decay_from=0.0)
    eager.run(2)
    captured = trainer(n_critic=2, decay_from=0.0, step_mode="compile")
    captured.steps.backend = "eager"
    captured.load_state_dict(copy.deepcopy(eager.state_dict()))
    eager.run()
    captured.run()
    assert (captured.steps.mode, eager.steps.mode, captured.steps.compilations) == ("compile", "eager", 2)
    assert captured.history.generator == pytest.approx(eager.history.generator, rel=1e-5)
    a, b = (t.generator.state_dict() for t in (captured, eager))
    assert largest_difference(a, b) < TOLERANCE["eager"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["compile", "cudagraph"])
def test_steps_on_a_gpu_equal_eager_ones(mode):
    eager, captured = (Setup("sagan", m, "inductor", "cuda", gradient_penalty=10.0) for m in ("eager", mode))
    captured.run(device="cuda")
    eager.run(device="cuda")
    a, b = captured.state(), eager.state()
    assert torch.equal(a["rng"], b["rng"])  # each replay draws what an eager step draws
    assert largest_difference(a, b) < 20 * TOLERANCE["inductor"]  # TF32 is off, convolution algorithms differ
    assert captured.step.compilations == 2


@pytest.mark.gpu
def test_replays_draw_afresh_and_seeds_reproduce():
    def losses():
        setup = Setup("sagan", "cudagraph", "inductor", "cuda")
        for group in (*setup.optimizer_g.param_groups, *setup.optimizer_d.param_groups):
            group["lr"] = 0.0
        setup.gan.discriminator.eval()
        return [float(setup.step.discriminator(batch(0, device="cuda"))["adversarial"]) for _ in range(4)]

    first = losses()
    assert len(set(first)) == 4
    assert losses() == first
