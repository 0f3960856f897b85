"""Two processes that shard a block by ``fully_shard`` get the outputs and gradients of one process."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastgan.nn import SelfAttention2d, fuse
from tests.processes import run_in_group


class Block(nn.Module):
    """A block of other code, to be fused."""

    def __init__(self):
        super().__init__()
        self.query_conv, self.key_conv, self.value_conv = (nn.Conv2d(16, n, 1) for n in (2, 2, 16))
        self.gamma = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        return x + self.gamma * (v @ torch.softmax(q.mT @ k, -1).mT).view_as(x)


def network(kind):
    torch.manual_seed(0)
    block = fuse(Block())[0] if kind == "fused" else SelfAttention2d(16)
    block.gamma.data.fill_(0.7)
    return nn.Sequential(nn.Conv2d(3, 16, 1), block)


def images():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def work(kind, rank, folder):
    model = network(kind)
    fully_shard(model[1])
    fully_shard(model)
    y = model(images())
    y.square().mean().backward()
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    if rank == 0:
        torch.save((y.detach(), gradients), f"{folder}/results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SelfAttention2d", "fused"])
def test_sharded_equals_whole(kind, tmp_path):
    run_in_group(partial(work, kind), 2, tmp_path)
    y, gradients = torch.load(tmp_path / "results.pt")
    model = network(kind)
    expected = model(images())
    expected.square().mean().backward()
    torch.testing.assert_close(y, expected)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)
