"""Two processes under fully_shard equal one process on the whole batch."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as older_spectral_norm

from fastgan.nn import fuse, group_spectral_norm, spectral_norm
from tests.processes import run_in_group

STEPS = 3
KINDS = {
    "single": lambda: critic(spectral_norm),
    "grouped": lambda: group_spectral_norm(critic(parametrizations.spectral_norm)),
    "fused": lambda: fuse(critic(parametrizations.spectral_norm))[0],
    "fused older": lambda: fuse(critic(older_spectral_norm))[0],
}


def critic(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(norm(nn.Conv2d(3, 6, 3)), nn.LeakyReLU(0.2)),
        nn.Flatten(),
        norm(nn.Linear(6 * 36, 5)),
        nn.LeakyReLU(0.2),
        norm(nn.Linear(5, 1)),
    ).double()


class Wrapper(nn.Module):
    """A module that wraps a linear layer for its norm and keeps the vectors as parameters."""

    power_iterations, name = 1, "weight"

    def __init__(self, module):
        super().__init__()
        self.module = module
        weight = module._parameters.pop("weight")
        module.weight_bar = weight
        for name, size in (("weight_u", weight.shape[0]), ("weight_v", weight.shape[1])):
            vector = nn.functional.normalize(torch.randn(size), dim=0)
            setattr(module, name, nn.Parameter(vector, requires_grad=False))

    def forward(self, x):
        w, u, v = self.module.weight_bar, self.module.weight_u, self.module.weight_v
        v.data = nn.functional.normalize(w.data.t() @ u.data, dim=0)
        u.data = nn.functional.normalize(w.data @ v.data, dim=0)
        self.module.weight = w / (u @ w @ v)
        return self.module.forward(x)


def images(step):
    return torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def sharded(network, how):
    """Units are the layers, the layers and the root, the root alone, or the first part and the root."""
    if how in ("layers", "all"):
        for layer in [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            fully_shard(layer)
    if how == "part":
        fully_shard(network[0])
    if how in ("all", "root", "part"):
        fully_shard(network)
    return network


def train(network, part):
    """Two forwards a step, whose gradients reach the images, as a generator's step needs."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-1)
    for step in range(STEPS):
        real, fake = (x[part].requires_grad_() for x in images(step))
        optimizer.zero_grad()
        (torch.relu(1 - network(real)).mean() + torch.relu(1 + network(fake)).mean()).backward()
        optimizer.step()


def whole(state):
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def work(rank, folder):
    results = {}
    for kind, make in KINDS.items():
        for how in ("layers", "all", "root", "part"):
            network = sharded(make(), how)
            train(network, slice(2 * rank, 2 * rank + 2))
            state = whole(network.state_dict())
            with torch.no_grad():
                results[f"{kind}, {how}"] = state, network.eval()(images(9)[0])
    # A part that is called first stays whole until the backward of what follows.
    network = KINDS["grouped"]()
    fully_shard(network[0])
    network[0](images(0)[0])
    x = images(0)[0].requires_grad_()
    network(x).sum().backward()
    results["part first"] = {"grad": x.grad}, x.detach()
    # If a weight is not whole, the error says so.
    unread = sharded(KINDS["grouped"](), "layers")
    bare = sharded(critic(lambda layer: layer), "layers")
    messages = []
    wrapped, report = fuse(nn.Sequential(Wrapper(nn.Linear(4, 4)), Wrapper(nn.Linear(4, 4))))
    assert len(report.swapped) == 2
    fully_shard(wrapped[1])
    for attempt in (
        lambda: unread[2].weight,
        lambda: group_spectral_norm(bare),
        lambda: spectral_norm(bare[2]),
        lambda: wrapped(torch.randn(2, 4)),
        lambda: wrapped(torch.randn(2, 4)),
    ):
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    torch.save((results, messages), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run_in_group(work, 2, tmp_path)
    for rank in range(2):
        results, messages = torch.load(tmp_path / f"{rank}.pt")
        for name, (state, output) in results.items():
            if name == "part first":
                continue
            single = critic(older_spectral_norm if "older" in name else parametrizations.spectral_norm)
            train(single, slice(0, 4))
            assert state.keys() == single.state_dict().keys()
            for key, value in single.state_dict().items():
                torch.testing.assert_close(state[key], value, msg=lambda m, key=key, name=name: f"{name}: {key}: {m}")
            torch.testing.assert_close(output, single.eval()(images(9)[0]))
        single = critic(parametrizations.spectral_norm)
        single[0](images(0)[0])
        x = images(0)[0].requires_grad_()
        single(x).sum().backward()
        torch.testing.assert_close(results["part first"][0]["grad"], x.grad)
        assert "must be a whole tensor when it is read" in messages[0]
        assert "0.0.weight must be whole, got a DTensor" in messages[1]
        assert "weight must be whole, got a DTensor" in messages[2]
        assert "vectors of a spectral norm must not be sharded" in messages[3]
        assert "vectors of a spectral norm must not be sharded" in messages[4]  # a second forward hides nothing
        assert len(messages) == 5
