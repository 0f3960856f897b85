"""Captured steps of a user's own modules and losses: optimizers, checkpoints, and a way out where capture fails."""

import copy
import warnings

import pytest
import torch
from torch import nn

from fastgan.backend import BackendWarning
from fastgan.distributed import World
from fastgan.losses.noise import draw, normal, uniform
from fastgan.losses.penalties import gradient_penalty
from fastgan.nn import group_spectral_norm
from fastgan.training import EMA, FunctionalGAN, TrainStep
from fastgan.training.step import capture
from fastgan.training.step.capture import CapturedUpdate
from fastgan.training.step.eager import Update
from fastgan.training.step.process_mean import ProcessMean
from tests.training.small_trainers import trainer
from tests.training.step.small_steps import OPTIMIZERS, STEPS, TOLERANCE, Setup, batch, largest_difference, moments


def own_gan(make_optimizer, mode, loss=None, norm=nn.BatchNorm1d):
    """Two modules and two losses, as a user brings them."""
    torch.manual_seed(1)
    g = nn.Sequential(nn.Linear(4, 8), norm(8), nn.Linear(8, 8), nn.Tanh()).double()
    d = group_spectral_norm(nn.Sequential(nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1)).double())

    def critic_loss(batch, draws):
        real, fake = batch["images"], g(draws["z"].double()).detach()
        penalty = gradient_penalty(d, real, fake, draws["alpha"].double())
        return {"adversarial": d(fake).mean() - d(real).mean(), "penalty": 10 * penalty}

    gan = FunctionalGAN(
        g, d, loss or critic_loss, lambda _, draws: -d(g(draws["z"].double())).mean(),
        draws=lambda n: {"z": normal(n, 4), "alpha": uniform(n, 1)},
    )  # fmt: skip
    optimizers = make_optimizer(g.parameters()), make_optimizer(d.parameters())
    return TrainStep(gan, *optimizers, mode=mode, backend="eager", rng=torch.Generator().manual_seed(0)), optimizers


def vectors(k, n=5):
    return {"images": torch.randn(n, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64)}


def steps(step, ks, n=5):
    return [(step.discriminator(vectors(k, n)), step.generator(vectors(k, n))) for k in ks]


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
    """A GAN with spectral norm and a gradient penalty, in float64; test_train_step has the recipes."""
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
    with pytest.warns(BackendWarning, match=r"discriminator step runs eagerly: generator(\.\d)?\.training has changed"):
        steps(captured, [3])
    captured.gan.generator.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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
    assert captured.compilations == 4  # anew at the second call that is like this


@pytest.mark.parametrize(
    ("make_optimizer", "mode", "reads", "reason"),
    [
        (OPTIMIZERS["adam"], "cudagraph", False, "CUDA graphs need a CUDA device, the generator is on cpu"),
        (torch.optim.NAdam, "compile", False, "optimizer must be Adam, AdamW, RMSprop or SGD, got NAdam"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.1, dampening=0.1), "compile", False, "SGD with dampening"),
        (OPTIMIZERS["adam"], "compile", True, "data-dependent|_local_scalar_dense|item"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_steps_that_cannot_be_captured_run_eagerly_with_one_reason(make_optimizer, mode, reads, reason):
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


class Rounding(torch.fx.Interpreter):
    """Runs a graph as a compiler that rounds otherwise would: each product is off by ``error`` times its values."""

    def __init__(self, graph, error):
        super().__init__(graph)
        self.error, self.rng = error, torch.Generator().manual_seed(2)

    def run_node(self, node):
        result = super().run_node(node)
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default):
            result = result * (1 + self.error * torch.randn(result.shape, generator=self.rng, dtype=result.dtype))
        return result


def step_on_one_batch(error, network):
    """Updates of a critic with a penalty on one batch again and again, as the moments that they leave."""
    name = f"fastgan_test_rounding_{network}_{error}"
    torch._dynamo.register_backend(lambda graph, _: Rounding(graph, error).run, name=name)
    # A rate of zero and no memory: what the moments change by from call to call is rounding alone.
    made = Setup("wgan-gp", "compile", backend=name)
    step = made.step
    for group in (*made.optimizer_g.param_groups, *made.optimizer_d.param_groups):
        group.update(lr=0.0, betas=(0.0, 0.9))
    for _ in range(4):
        step.rng.manual_seed(0)
        getattr(step, network)(batch(0))
    return step


@pytest.mark.parametrize("network", ["discriminator", "generator"])
def test_a_graph_that_only_rounds_otherwise_is_taken(network, recwarn):
    step = step_on_one_batch(1e-6, network)
    assert step.compilations == 1
    assert not [w for w in recwarn if issubclass(w.category, BackendWarning)]


@pytest.mark.parametrize("network", ["discriminator", "generator"])
def test_a_graph_with_errors_above_rounding_is_refused(network):
    with pytest.warns(BackendWarning, match=f"the {network} step runs eagerly: captured, it would leave other values"):
        step_on_one_batch(1e-2, network)


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
    with pytest.raises(ValueError, match="optimizer_g must hold weights of the generator, it holds none"):
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
    """A parameter without a gradient is left alone, as by ``backward`` and an optimizer's ``step``."""

    results = []
    for mode in ("eager", "compile"):
        unused = nn.Parameter(torch.ones(3))
        gan = own_gan(OPTIMIZERS[name], mode)[0].gan
        networks = gan.generator, gan.discriminator
        for network in networks:
            network.unused = unused
        optimizers = [OPTIMIZERS[name](network.parameters()) for network in networks]
        step = TrainStep(gan, *optimizers, mode=mode, backend="eager", rng=torch.Generator().manual_seed(0))
        results.append([steps(step, range(3)), step.gan.generator.state_dict(), step.gan.discriminator.state_dict()])
        assert torch.equal(unused, torch.ones(3))
    assert step.compilations == 2
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_the_trainer_captures_if_asked_and_resumes_an_eager_checkpoint():
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


class EagerReplay:
    """Stand-in for a CUDA graph on a machine without a GPU: static inputs and outputs, state as it was when made."""

    def __init__(self, function, inputs, state, rng, pool):
        self.function, self.inputs = function, {name: value.clone() for name, value in inputs.items()}
        self.state, self.addresses = state, [t.data_ptr() for t in state]
        kept, rng_state = [t.detach().clone() for t in state], rng.get_state()
        self.outputs = [output.clone() for output in function(self.inputs)]
        torch._foreach_copy_([t.detach() for t in state], kept)
        rng.set_state(rng_state)

    def __call__(self, inputs):
        assert [t.data_ptr() for t in self.state] == self.addresses  # where a CUDA graph would read and write
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        torch._foreach_copy_(self.outputs, self.function(self.inputs))
        return self.outputs


@pytest.mark.parametrize("exchanges", [False, True])
def test_a_replay_follows_state_that_was_replaced(monkeypatch, exchanges):
    """If ``exchanges``, a process exchanges gradients with itself between two graphs."""
    monkeypatch.setattr(capture, "CudaGraph", EagerReplay)
    monkeypatch.setattr(ProcessMean, "reduce_", lambda *_: None)
    results = []
    for replayed in (False, True):
        step, optimizers = own_gan(OPTIMIZERS["adam"], "eager")
        mean = ProcessMean(World()) if exchanges else None
        update = Update.of_gan(step.gan, "generator", optimizers[0], ema=EMA(step.gan.generator, 0.9), mean=mean)

        def drawn(batch, rng=step.rng, update=update):
            return draw(update.draws(batch), rng, "cpu")

        example = drawn(vectors(0), torch.Generator())
        captured = CapturedUpdate(update, vectors(0), example, lambda graph, _: graph)
        terms = []
        for k in range(4):
            if k == 2:
                optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            if k == 3:
                step.gan.generator.half().double()  # as cpu() and cuda(): the same parameters with other data
            batch = vectors(k)
            replay = captured.capture_replay(batch, drawn, step.rng, None) if replayed else None
            terms.append(replay(batch) if replay else captured(batch, drawn(batch)))
        results.append(
            [terms, step.gan.generator.state_dict(), update.ema.module.state_dict(), moments(optimizers[:1])]
        )
    torch.testing.assert_close(*results, rtol=0, atol=0)
