"""FeatureStats against NumPy in float64: streaming, merging, offsets, bad input."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.metrics import FeatureStats, InputError


def features(n, dim, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + offset


def streamed(rows, sizes):
    stats = FeatureStats()
    for batch in rows.split(sizes):
        stats.update(batch)
    return stats


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(
    ("dim", "sizes"),
    [
        (7, [50]),
        (7, [1, 1, 2, 46]),
        (7, [6, 1, 1, 42]),
        (1, [3, 4]),
        (64, [10, 30]),
        (64, [64]),
        (64, [64, 1]),
        (5, [2]),
    ],
)
def test_moments_equal_numpy(dim, sizes):
    rows = features(sum(sizes), dim)
    stats = streamed(rows, sizes)
    assert stats.n == sum(sizes)
    assert stats.dim == dim
    assert relative(stats.mean.numpy(), rows.numpy().mean(axis=0)) < 1e-13
    assert relative(stats.cov.numpy(), np.cov(rows.numpy(), rowvar=False).reshape(dim, dim)) < 1e-12
    assert stats.mean.dtype == stats.cov.dtype == torch.float64


@pytest.mark.parametrize("sizes", [[20], [1, 19], [100, 300, 1], [1] * 50])
def test_large_offset_keeps_the_covariance(sizes):
    rows = features(sum(sizes), 16, offset=1e6)
    exact = np.cov((rows - 1e6).numpy(), rowvar=False)  # the difference is exact: both are doubles near 1e6
    assert relative(streamed(rows, sizes).cov.numpy(), exact) < 1e-9


def test_drifting_batches_keep_the_covariance():
    rows = torch.cat([features(40, 8, seed=i, offset=1e4 * i) for i in range(6)])
    assert relative(streamed(rows, 40).cov.numpy(), np.cov(rows.numpy(), rowvar=False)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_accumulated_in_float64(dtype):
    rows = features(300, 12).to(dtype)
    stats = streamed(rows, 77)
    assert stats.dtype == str(dtype).removeprefix("torch.")
    assert relative(stats.cov.numpy(), np.cov(rows.double().numpy(), rowvar=False)) < 1e-12


def test_non_contiguous_and_numpy_features():
    rows = features(9, 40).T  # 40 vectors of 9 features, strided
    assert not rows.is_contiguous()
    expected = np.cov(rows.numpy(), rowvar=False)
    assert relative(FeatureStats().update(rows).cov.numpy(), expected) < 1e-13
    assert relative(FeatureStats().update(rows.numpy()).cov.numpy(), expected) < 1e-13


def test_update_copies_the_batch():
    buffer = features(4, 8)
    stats = FeatureStats().update(buffer)
    before = stats.cov
    buffer.fill_(7.0)
    assert torch.equal(stats.cov, before)


def test_features_with_a_graph_are_detached():
    rows = features(4, 8).requires_grad_()
    assert not FeatureStats().update(rows * 2).cov.requires_grad


@pytest.mark.parametrize("sizes", [(5, 9, 30), (3, 3, 3), (1, 40, 2), (0, 7, 1)])
def test_merge_in_any_order(sizes):
    rows = features(sum(sizes), 10)
    expected = np.cov(rows.numpy(), rowvar=False)
    for order in itertools.permutations(rows.split(sizes)):
        parts = [FeatureStats(10).update(part) for part in order]
        left = FeatureStats(10)
        for part in parts:
            left.merge(part)
        right = parts[2].merge(parts[1]).merge(parts[0])
        for merged in (left, right):
            assert merged.n == sum(sizes)
            assert relative(merged.cov.numpy(), expected) < 1e-10
            assert relative(merged.mean.numpy(), rows.numpy().mean(axis=0)) < 1e-10
            assert (merged.factor is not None) == (sum(sizes) <= 10)


def test_merge_leaves_the_other_side():
    a, b = FeatureStats().update(features(5, 4)), FeatureStats().update(features(3, 4, seed=1))
    before = b.cov
    a.merge(b).update(features(2, 4))
    assert b.n == 3
    assert torch.equal(b.cov, before)


def test_factor_is_held_up_to_dim_vectors():
    rows = features(8, 8, offset=3.0)
    stats = FeatureStats()
    assert stats.factor is None
    for n in range(1, 9):
        stats.update(rows[n - 1 : n])
        assert relative(stats.factor.numpy() + 1, (rows[:n] - rows[:n].mean(0)).numpy() + 1) < 1e-13
    assert relative((stats.factor.T @ stats.factor / 7).numpy(), stats.cov.numpy()) < 1e-13
    assert stats.update(rows[:1]).factor is None


def test_from_moments():
    rows = features(30, 6)
    stats = FeatureStats.from_moments(rows.mean(0), torch.cov(rows.T), n=30)
    more = features(5, 6, seed=1)
    stats.update(more)
    assert relative(stats.cov.numpy(), np.cov(torch.cat([rows, more]).numpy(), rowvar=False)) < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_feature_is_named_by_row(bad):
    stats = FeatureStats().update(features(10, 4))
    rows = features(5, 4)
    rows[3, 1] = bad
    before = stats.cov
    with pytest.raises(InputError, match=r"row 3 of this batch \(vector 13 in all\)"):
        stats.update(rows)
    assert stats.n == 10
    assert torch.equal(stats.cov, before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), "features must have 2 dimensions"),
        (torch.zeros(3, 4, 5), "features must have 2 dimensions"),
        (torch.zeros(3, 4, dtype=torch.int64), "features must have dtype"),
        (torch.zeros(3, 4, dtype=torch.complex64), "features must have dtype"),
        (torch.zeros(3, 5), "features must have 4 features per vector, got 5"),
    ],
)
def test_wrong_features(value, message):
    with pytest.raises(ValueError, match=message):
        FeatureStats(4).update(value)


def test_too_few_vectors():
    stats = FeatureStats()
    with pytest.raises(InputError, match="mean needs at least 1 feature vector, there are 0"):
        _ = stats.mean
    stats.update(features(1, 4))
    assert stats.mean.shape == (4,)
    with pytest.raises(InputError, match="cov needs at least 2 feature vectors, there are 1"):
        _ = stats.cov


def test_wrong_merges():
    stats = FeatureStats(backbone="inception").update(features(3, 4))
    with pytest.raises(InputError, match="other must have 4 features per vector, got 5"):
        stats.merge(FeatureStats().update(features(3, 5)))
    with pytest.raises(InputError, match="differ in backbone: inception and other"):
        stats.merge(FeatureStats(backbone="other").update(features(3, 4)))
    unknown = FeatureStats.from_moments(torch.zeros(4), torch.eye(4))
    for left, right in ((stats, unknown), (unknown, stats)):
        with pytest.raises(InputError, match="n is unknown"):
            left.merge(right)
    with pytest.raises(InputError, match="n is unknown"):
        unknown.update(features(1, 4))
    with pytest.raises(ValueError, match="dim must be at least 1"):
        FeatureStats(0)


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (torch.zeros(2, 2), torch.eye(2), r"mean must have shape \(dim,\)"),
        (torch.zeros(2), torch.eye(3), r"cov must have shape \(2, 2\)"),
        (torch.tensor([0.0, float("nan")]), torch.eye(2), "mean must be finite"),
        (torch.zeros(2), torch.tensor([[1.0, 0], [0, float("inf")]]), "cov must be finite"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0, 1]]), "cov must be symmetric"),
        (torch.zeros(2), torch.tensor([[1.0, 0], [0, -1]]), "no negative value on its diagonal"),
        (torch.zeros(2), torch.eye(2, dtype=torch.complex64), "must be real"),
    ],
)
def test_wrong_moments(mean, cov, message):
    with pytest.raises(InputError, match=message):
        FeatureStats.from_moments(mean, cov)


def test_memory_does_not_grow_with_the_number_of_vectors():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("resident memory is read from /proc")

    def resident():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    stats = FeatureStats()
    for batches in (20, 180):
        before = resident()
        for _ in range(batches):
            stats.update(torch.randn(100, 512))
    assert stats.n == 20_000
    assert resident() - before < 8 * 2**20  # the last 18,000 vectors are 74 MB


@pytest.mark.gpu
def test_moments_on_the_gpu_equal_the_cpu():
    rows = features(500, 64)
    stats = FeatureStats().update(rows[:100].cuda()).update(rows[100:].cuda())
    assert stats.cov.is_cuda
    assert relative(stats.cov.cpu().numpy(), np.cov(rows.numpy(), rowvar=False)) < 1e-12
