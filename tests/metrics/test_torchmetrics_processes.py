"""The torchmetrics classes over gloo, where a process may have no images, or not come at all."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("torchmetrics")

from fastgan.metrics import (
    ClassFrechetDistance,
    FrechetInceptionDistance,
    InceptionScore,
    KernelInceptionDistance,
    PrecisionRecall,
)
from tests.processes import run_in_group

N = 48


class Network(nn.Module):
    """Images (n, 3, 2, 2) to 12 features, float64: a process without images cannot know the dtype."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1).double()


def metrics(**options):
    return {
        "fid": FrechetInceptionDistance(Network(), **options),
        "kid": KernelInceptionDistance(Network(), subsets=3, subset_size=N, **options),
        "prdc": PrecisionRecall(Network(), k=3, **options),
        "is": InceptionScore(Network(), splits=1, **options),
        "class": ClassFrechetDistance(2, Network(), **options),
    }


def images(seed):
    return torch.randn(N, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) + seed / 4


def feed(found, part):
    real, fake, labels = images(0)[part], images(1)[part], (torch.arange(N) % 2)[part]
    if not len(labels):
        return found
    for name, metric in found.items():
        if name == "is":
            metric.update(fake)
        elif name == "class":
            metric.update(real, labels, real=True)
            metric.update(fake, labels, real=False)
        else:
            metric.update(real, real=True)
            metric.update(fake, real=False)
    return found


def numbers(value):
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
    return torch.cat([one.double().reshape(-1) for one in values])


def told_by(found):
    """The errors of computing each metric."""
    told = {}
    for name, metric in found.items():
        try:
            metric.compute()
        except RuntimeError as error:
            told[name] = str(error)
    return told


def work(rank, folder):
    busy = dist.get_world_size() - 1  # the last has no images
    part = torch.arange(N)[rank::busy] if rank < busy else torch.arange(0)
    values = {name: numbers(metric.compute()) for name, metric in feed(metrics(), part).items()}
    nobody = told_by(metrics())
    alone = {}
    late = feed(metrics(sync_timeout=1.0), part)
    if rank == 1:
        alone = told_by(late)
        Path(folder, "done").touch()
    while not Path(folder, "done").exists():
        time.sleep(0.05)
    torch.save((values, nobody, alone), f"{folder}/{rank}.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_without_images_and_one_that_computes_alone(tmp_path, size):
    expected = {name: numbers(metric.compute()) for name, metric in feed(metrics(), torch.arange(N)).items()}
    run_in_group(work, size, tmp_path)
    for rank in range(size):
        values, nobody, alone = torch.load(tmp_path / f"{rank}.pt")
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=f"{name} of rank {rank}")
        assert set(nobody) == set(expected)
        assert all("images" in message for message in nobody.values())
        assert set(alone) == (set(expected) if rank == 1 else set())
        for message in alone.values():
            assert "must be called in all processes of its group: after 1 seconds some had not" in message
