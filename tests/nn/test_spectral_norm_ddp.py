"""Two processes under DistributedDataParallel, two forwards a step, equal one process on the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from fastgan.nn import group_spectral_norm
from tests.processes import run_in_group

STEPS = 3


def critic():
    torch.manual_seed(0)
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(6 * 36, 1)),
    ).double()


def images(step):
    return torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(network, part):
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(STEPS):
        real, fake = (x[part] for x in images(step))
        optimizer.zero_grad()
        (torch.relu(1 - network(real)).mean() + torch.relu(1 + network(fake)).mean()).backward()
        optimizer.step()


def work(rank, folder):
    network = group_spectral_norm(critic())
    train(DistributedDataParallel(network), slice(2 * rank, 2 * rank + 2))
    torch.save(network.state_dict(), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run_in_group(work, 2, tmp_path)
    single = critic()
    train(single, slice(0, 4))
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        for name, value in single.state_dict().items():
            torch.testing.assert_close(state[name], value, msg=lambda m, name=name: f"{name}: {m}")
