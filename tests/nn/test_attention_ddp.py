"""Two processes under DistributedDataParallel get the gradients that one process gets on the whole batch."""

import torch
from torch.nn.parallel import DistributedDataParallel

from fastgan.nn import SelfAttention2d
from tests.processes import run_in_group


def block():
    torch.manual_seed(0)
    block = SelfAttention2d(16).double()
    block.gamma.data.fill_(0.7)
    return block


def images():
    return torch.randn(4, 16, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(network, x):
    """A mean over the batch, with a gradient penalty through the block."""
    x = x.requires_grad_()
    y = network(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return (y.flatten(1).sum(dim=1) + (gradient.flatten(1).norm(dim=1) - 1).square()).mean()


def work(rank, folder):
    network = DistributedDataParallel(block())
    loss(network, images().chunk(2)[rank].clone()).backward()
    if rank == 0:
        torch.save([p.grad for p in network.module.parameters()], f"{folder}/gradients.pt")


def test_gradients_equal_those_of_one_process(tmp_path):
    run_in_group(work, 2, tmp_path)
    single = block()
    loss(single, images()).backward()
    for actual, parameter in zip(torch.load(tmp_path / "gradients.pt"), single.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad)
