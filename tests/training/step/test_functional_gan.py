"""Captured steps of a user's own modules and losses: optimisers, checkpoints, and a way out where capture fails."""

import copy
import warnings

import pytest
import torch
from torch import nn

from fastgan.backend import BackendWarning
from fastgan.losses.noise import normal, uniform
from fastgan.losses.penalties import gradient_penalty
from fastgan.nn import group_spectral_norm
from fastgan.training import OwnGan, TrainStep
from fastgan.training.step.optimizer_state import OptimizerState
from tests.training.step.test_train_step import STEPS, TOLERANCE, fresh_warnings, largest_difference
from tests.training.test_trainer import trainer

__all__ = ["fresh_warnings"]

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.5, 0.9), weight_decay=0.1, amsgrad=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.9), fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, weight_decay=0.1, centered=True),
    "rmsprop, plain": lambda p: torch.optim.RMSprop(p, 1e-3),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd, plain": lambda p: torch.optim.SGD(p, 1e-2),
}


def own_gan(make_optimizer, mode, loss=None, norm=nn.BatchNorm1d):
    """Two modules and two losses, as a user brings them."""
    torch.manual_seed(1)
    g = nn.Sequential(nn.Linear(4, 8), norm(8), nn.Linear(8, 8), nn.Tanh()).double()
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_another_memory_layout_continue(name):
    """A checkpoint of a channels-first run, loaded where the weights are channels-last."""
    torch.manual_seed(2)
    first, gradient = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(first.clone())
        optimizer = OPTIMIZERS[name]([weight])
        weight.grad = gradient
        optimizer.step()
        continued = nn.Parameter(weight.detach().contiguous(memory_format=layout))
        same = OPTIMIZERS[name]([continued])
        same.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        state = OptimizerState(same, [continued])
        state.refresh()
        with torch.no_grad():
            traced = {id(continued): continued}
            state.update(traced, {id(continued): gradient * 2}, state.tensors(), state.rates)
        results.append([continued, *moments([same])])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


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
def test_updates_through_inductor_equal_eager_ones():
    """With spectral norm and a gradient penalty, in float64; test_train_step has the recipes."""
    states = []
    for mode in ("eager", "compile"):
        step, optimizers = own_gan(OPTIMIZERS["adam"], mode, norm=nn.Identity)
        step.backend = "inductor"
        losses = [step.discriminator(vectors(k)) for k in range(STEPS)]
        networks = (step.gan.generator, step.gan.discriminator)
        states.append([losses, *(m.state_dict() for m in networks), moments(optimizers[1:])])
    assert step.compilations == 1
    torch.testing.assert_close(states[1], states[0], rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize("begins_frozen", [False, True])
def test_weights_may_be_frozen_and_thawed_between_steps(begins_frozen):
    captured, eager = (own_gan(OPTIMIZERS["adam"], mode)[0] for mode in ("compile", "eager"))
    results = []
    for step in (captured, eager):
        weight = step.gan.generator[0].weight
        weight.requires_grad_(not begins_frozen)
        steps(step, [0])
        weight.requires_grad_(begins_frozen)
        before = weight.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BackendWarning)
            results.append(steps(step, [1, 2]))
        assert torch.equal(before, weight) is not begins_frozen
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert captured.compilations == 2


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


def test_bad_arguments_are_named():
    step, (optimizer_g, optimizer_d) = own_gan(OPTIMIZERS["adam"], "eager")
    with pytest.raises(TypeError, match="batch must be a mapping of names to tensors, got Tensor"):
        step.discriminator(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="optimizer_g must hold weights of the generator, it has none of them"):
        TrainStep(step.gan, optimizer_d, optimizer_g)
    weight = step.gan.generator[0].weight
    for loss, message in (
        (weight, r"discriminator_loss must return scalar tensors, got \(8, 4\) for 'loss'"),
        ({"a": 1.0}, "discriminator_loss must return scalar tensors, got float for 'a'"),
        (weight.sum(), "the loss must depend on weights of the network"),
    ):
        step.gan._discriminator_loss = lambda *_, loss=loss: loss
        with pytest.raises(ValueError, match=message):
            step.discriminator(vectors(0))


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_weights_that_the_loss_does_not_reach_stay(name):
    """As with ``backward`` and ``step``: an optimiser leaves alone what has no gradient."""

    def with_unused(parameters):
        return OPTIMIZERS[name]([unused, *parameters])

    results = []
    for mode in ("eager", "compile"):
        unused = nn.Parameter(torch.ones(3))
        step, _ = own_gan(with_unused, mode)
        for network in (step.gan.generator, step.gan.discriminator):
            network.unused = unused
        results.append([steps(step, range(3)), step.gan.generator.state_dict(), step.gan.discriminator.state_dict()])
        assert torch.equal(unused, torch.ones(3))
    assert step.compilations == 2
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


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
