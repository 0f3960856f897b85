"""On a CPU too, attention keeps no N x M map: the most bytes alive at N = M = 4096, batch 4 (maps: 268 MB)."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan.reference.attention import attention_bwd, attention_bwd_bwd, attention_eager, attention_fwd

B, N, M, D, E = 4, 4096, 4096, 8, 32
MAPS = 4 * B * N * M


class PeakBytes(TorchDispatchMode):
    """Follows the storages that operators return; ``peak`` is the most that were alive after any of them."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.fixture(scope="module")
def operands():
    return torch.randn(B, N, D), torch.randn(B, M, D), torch.randn(B, M, E)


def test_the_measurement_sees_the_maps_of_eager_attention(operands):
    with PeakBytes() as memory, torch.no_grad():
        attention_eager(*operands)
    assert memory.peak >= MAPS


def test_three_passes_stay_linear(operands):
    with PeakBytes() as memory:
        o, stats = attention_fwd(*operands, 1.0)
        attention_bwd(o, *operands, o, stats, 1.0)
        attention_bwd_bwd(*operands, o, *operands, o, stats, 1.0)
    assert memory.peak < MAPS / 4
