"""The kernel distance: against torchmetrics and its definition, loop by loop."""

import pytest

from fastgan.metrics import InputError, kernel_distance
from fastgan.metrics.kid import squared_mmd
from tests.metrics.rows import UNUSABLE_PAIRS, rows


@pytest.mark.parametrize("options", [{}, {"degree": 2, "gamma": 0.3, "coef": 2.0}])
def test_squared_mmd_is_its_double_sum(options):
    x, y = rows(7, 6, shift=0.4), rows(5, 6, seed=1)
    degree, gamma, coef = options.get("degree", 3), options.get("gamma", 1 / 6), options.get("coef", 1.0)

    def mean_kernel(left, right, skip_same):
        pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if not (skip_same and i == j)]
        return sum((gamma * float(left[i] @ right[j]) + coef) ** degree for i, j in pairs) / len(pairs)

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)
    assert squared_mmd(x, y, **options).item() == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_equals_torchmetrics_if_a_subset_is_the_whole_set():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = rows(60, shift=0.2), rows(60, seed=1)
    theirs = kid.poly_mmd(x, y)
    ours = kernel_distance(x, y, subsets=3, subset_size=60)
    assert ours.mean == pytest.approx(theirs.item(), rel=1e-10)
    assert ours.std < 1e-12
    assert (ours.subsets, ours.subset_size) == (3, 60)


def test_kernel_distance_is_unbiased_and_seeded():
    x, y = rows(500), rows(400, seed=1)
    ours = kernel_distance(x, y, subsets=50, subset_size=100, seed=3)
    assert ours == kernel_distance(x, y, subsets=50, subset_size=100, seed=3)
    assert ours != kernel_distance(x, y, subsets=50, subset_size=100, seed=4)
    assert abs(ours.mean) < 3 * ours.std  # one distribution: zero on average, not biased upwards
    assert kernel_distance(x, y + 1, subsets=50, subset_size=100).mean > 10 * ours.std
    assert kernel_distance(x, y, subset_size=1000, subsets=2).subset_size == 400


@pytest.mark.parametrize(("real", "fake", "message"), UNUSABLE_PAIRS)
def test_wrong_features(real, fake, message):
    with pytest.raises(InputError, match=message):
        kernel_distance(real, fake)


def test_wrong_arguments():
    x = rows(5)
    for call, message in (
        (lambda: kernel_distance(x, x, subsets=0), "subsets must be at least 1"),
        (lambda: kernel_distance(x, x, subset_size=1), "subset_size must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("size", [10, 30, 45])
def test_subsets_of_one_kernel_matrix_equal_their_own(size, monkeypatch):
    """Small sets compute the kernel of all pairs once; the subsets and their values are the same."""
    real, fake = rows(60), rows(45, shift=0.5, seed=1)
    found = kernel_distance(real, fake, subsets=7, subset_size=size)
    monkeypatch.setattr("fastgan.metrics.kid._MOST", 40)
    expected = kernel_distance(real, fake, subsets=7, subset_size=size)
    assert (found.mean, found.std) == pytest.approx((expected.mean, expected.std), rel=1e-9)
