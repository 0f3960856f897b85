"""Statistics of several processes, over gloo: uneven shares, a process without vectors, the command under torchrun."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastgan.metrics import FeatureStats, FrechetInceptionDistance, InputError
from fastgan.metrics.distributed import World, current_world, gather_rows

DIM = 6


def all_rows(n):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 1e3


def module_fed(real, fake):
    metric = FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(DIM,))
    for rows, is_real in ((real, True), (fake, False)):
        for part in rows.split(4):
            metric.update(part, real=is_real)
    return metric


def halves(rank):
    real, fake = all_rows(31), all_rows(22)
    return (real[:25], fake[:3]) if rank == 0 else (real[25:], fake[3:])


def work(rank, size, store, folder):
    """One process; every case is a list of vectors per process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for counts in CASES[size]:
        first = sum(counts[:rank])
        rows = all_rows(sum(counts))[first : first + counts[rank]]
        stats = FeatureStats(None if rank else DIM, backbone="inception" if rank == 0 else None)
        stats.update(rows) if len(rows) else None
        stats.all_reduce()
        gathered = gather_rows(rows, current_world())
        assert torch.equal(gathered, all_rows(sum(counts)))
        torch.save((stats.n, stats.mean, stats.cov, stats.factor, stats.backbone), f"{folder}/{counts}-{rank}.pt")
    if size == 2:
        torch.save(module_fed(*halves(rank)).compute(), f"{folder}/metric-{rank}.pt")
    other = FeatureStats(DIM, backbone=f"network {rank}").update(all_rows(9))
    with pytest.raises(InputError, match="differ in backbone: network 0, network 1"):
        other.all_reduce()
    dist.destroy_process_group()


CASES = {2: [(40, 3), (0, 50), (2, 3), (0, 4)], 3: [(30, 1, 12), (1, 0, 40), (2, 2, 1), (0, 0, 7)]}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_all_reduce_equals_one_process(tmp_path, size):
    mp.spawn(work, args=(size, tmp_path / "store", tmp_path), nprocs=size)
    for counts in CASES[size]:
        rows = all_rows(sum(counts))
        exact = torch.cov((rows - 1e3).T)
        for rank in range(size):
            n, mean, cov, factor, backbone = torch.load(tmp_path / f"{counts}-{rank}.pt")
            assert (n, backbone) == (sum(counts), "inception")
            assert (factor is not None) == (n <= DIM)
            torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=0)
            assert (cov - exact).abs().max() <= 1e-10 * exact.abs().max()
    if size == 2:
        alone = module_fed(all_rows(31), all_rows(22)).compute()
        for rank in range(size):
            torch.testing.assert_close(torch.load(tmp_path / f"metric-{rank}.pt"), alone, rtol=1e-8, atol=0)


def test_all_reduce_needs_a_process_group():
    with pytest.raises((RuntimeError, ValueError), match="process group"):
        FeatureStats().update(all_rows(3)).all_reduce()


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_shares_in_order_are_the_whole(n):
    assert [i for rank in range(5) for i in World(rank, 5).share(n)] == list(range(n))
