"""Optimizers as captured ops: numbers and state dicts of torch, in any memory layout."""

import copy

import pytest
import torch
from torch import nn

from fastgan.training import NetworkUpdate, TrainStep
from fastgan.training.step.optimizers import OptimizerState
from tests.training.step.small_steps import OPTIMIZERS, moments


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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])  # while calls are compared, and later
def test_a_state_that_was_cleared_begins_anew(name, steps):
    """Some loops call ``optimizer.state.clear()`` when they change the learning rate."""
    results = []
    for mode in ("eager", "compile"):
        torch.manual_seed(2)
        net = nn.Linear(4, 3)
        optimizer = OPTIMIZERS[name](net.parameters())
        update = NetworkUpdate(lambda batch, draws, net=net: net(batch["x"]).square().mean(), "net", optimizer)
        step = TrainStep.of_updates({"net": net}, {"net": update}, mode=mode, backend="eager")
        for i in range(steps + 2):
            if i == steps:
                optimizer.state.clear()
            step.update("net", {"x": torch.ones(2, 4)})
        results.append([*net.parameters(), *moments([optimizer])])
        assert step.compilations == (mode == "compile")
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
