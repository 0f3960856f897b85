"""Captured steps of every recipe: equal to eager ones in every tensor, one compilation, layouts and dtypes kept."""

import importlib
import os
import warnings

import pytest
import torch

from fastgan.backend import BackendWarning
from fastgan.recipes import available
from tests.training.step.small_steps import FLOAT64_TOLERANCE, STEPS, TOLERANCE, Setup, batch, largest_difference

SYSTEMS = [name for name in available() if not name.endswith("-digits")]


def assert_equal_after_steps(name, backend, tolerance, **options):
    eager, captured = (Setup(name, mode, backend, **options) for mode in ("eager", "compile"))
    start = {key: value.clone() for key, value in captured.state().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        captured.run()
    eager.run()
    assert largest_difference(captured.state(), eager.state()) < tolerance
    assert captured.step.compilations == 2  # one a network, none after the first step
    moved = [key for key, value in captured.state().items() if key in start and not torch.equal(start[key], value)]
    for part in ("g.", "d.", "ema.", "updates", "rng"):
        assert any(key.startswith(part) for key in moved), part
    return captured


@pytest.mark.parametrize("name", SYSTEMS)
def test_five_captured_steps_equal_eager_ones(name):
    """Maps also keep their layout in the graphs: only the smallest, which are or become vectors, are copied."""
    captured = assert_equal_after_steps(name, "eager", TOLERANCE["eager"])
    smallest = (8, 8) if name == "sketch-cgan" else (4, 4)
    assert len(captured.step.graphs) == 2
    for graph in captured.step.graphs:
        assert set(layout_copies(graph)) <= {smallest}


def test_five_captured_steps_of_a_vision_transformer_equal_eager_ones():
    assert_equal_after_steps("vit-digits", "eager", TOLERANCE["eager"])


@pytest.mark.slow
@pytest.mark.skipif(
    "FASTGAN_TEST_INDUCTOR" not in os.environ, reason="minutes of C++ compilation: FASTGAN_TEST_INDUCTOR=1"
)
@pytest.mark.parametrize("name", SYSTEMS)
def test_five_steps_through_inductor_equal_eager_ones(name, float64):
    assert_equal_after_steps(name, "inductor", FLOAT64_TOLERANCE, eps=1e-8)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weights_after(steps, dtype, **options):
    torch.set_default_dtype(dtype)
    try:
        state = Setup("sagan", "eager", **options).run(steps).state()
        return {key: value for key, value in state.items() if key.startswith(("g.", "d."))}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_the_effect_of_another_rounding_on_a_step():
    """Inductor's steps are compared in float64, or in float32 with a large eps, for the reason that this test shows.

    Two eager runs that differ in memory layout, and so in the order of sums, are 2e-3 apart after one float32 step at
    learning rate 1e-3: gradients that batch norm makes zero are rounding noise, of which Adam with an eps of 1e-8 makes
    full steps of either sign. With an eps of 1e-3, or in float64, the same runs agree.

    Later float32 steps may jump with any eps: in the third, one input of a ReLU of the generator is 4e-7 in one run and
    not positive in the other, the only kink that they take differently, and 3e-7 between them becomes 2e-4. In float64
    they stay 2e-15 apart.
    """

    def difference(steps, dtype, eps):
        layouts = torch.channels_last, torch.contiguous_format
        return largest_difference(*(weights_after(steps, dtype, eps=eps, layout=layout) for layout in layouts))

    assert difference(1, torch.float32, 1e-8) > 1e-3
    assert difference(1, torch.float32, 1e-3) < 1e-6
    assert difference(1, torch.float64, 1e-8) < 1e-9
    assert difference(4, torch.float64, 1e-3) < 1e-12


def test_a_broken_double_backward_is_found(monkeypatch):
    """The graph's ``attention_bwd_bwd`` gets the sign of one cotangent wrong: the states must differ."""
    attention_ops = importlib.import_module("fastgan.ops._attention")
    right = attention_ops._attention_bwd_bwd
    eager, captured = (Setup("sagan", mode, gradient_penalty=10.0) for mode in ("eager", "compile"))
    eager.step.discriminator(batch(0))
    monkeypatch.setattr(attention_ops, "_attention_bwd_bwd", lambda ggq, *rest: right(-ggq, *rest))
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
    (graph,) = captured.step.graphs
    dtypes = {first_value(n).dtype for n in graph.graph.nodes if n.target == torch.ops.aten.convolution.default}
    assert dtypes == {torch.bfloat16, torch.float32}  # the passes on images, and the penalty
    attention = torch.ops.fastgan.attention_bwd_bwd.default
    assert {n.args[0].meta["val"].dtype for n in graph.graph.nodes if n.target == attention} == {torch.float32}
    moments = [entry["exp_avg_sq"] for entry in captured.optimizer_d.state.values()]
    assert {m.dtype for m in moments} == {torch.float32}


def first_value(node):
    value = node.meta["val"]
    return value[0] if isinstance(value, (list, tuple)) else value


def layout_copies(graph):
    """Heights of the maps that a graph copies to another memory layout."""
    copies = []
    for node in graph.graph.nodes:
        if node.target in (
            torch.ops.aten.clone.default,
            torch.ops.aten.contiguous.default,
            torch.ops.aten._to_copy.default,
        ):
            value, source = first_value(node), first_value(node.args[0])
            if value.ndim == 4 and value.stride() != source.stride():
                copies.append(tuple(value.shape[2:]))
    return copies


def steps_on_a_gpu(name, mode, steps, **options):
    """States after eager steps and after captured ones, whose draws must be the same."""
    eager, captured = (Setup(name, m, "inductor", "cuda", **options) for m in ("eager", mode))
    captured.run(steps, device="cuda")
    eager.run(steps, device="cuda")
    assert captured.step.compilations == 2
    a, b = captured.state(), eager.state()
    assert torch.equal(a["rng"], b["rng"])
    return a, b


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["compile", "cudagraph"])
@pytest.mark.parametrize("name", ["sagan", "wgan-gp", "acgan"])
def test_five_steps_on_a_gpu_equal_eager_ones(name, mode, float64):
    assert largest_difference(*steps_on_a_gpu(name, mode, STEPS, gradient_penalty=10.0 * (name != "acgan"))) < 1e-7


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["compile", "cudagraph"])
def test_a_step_with_kernels_on_a_gpu_equals_an_eager_one(mode):
    """One step in float32: later ones take their rounding over the kinks of ReLU and hinge."""
    states = steps_on_a_gpu("sagan", mode, 1, gradient_penalty=10.0, impl="auto")
    assert largest_difference(*states) < 5 * TOLERANCE["inductor"]


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
