"""The kernel distance: against torchmetrics and its definition, loop by loop."""

import pytest
import torch

from fastgan.metrics import InputError, kernel_distance, kid
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
    with pytest.raises(InputError, match="overflows"):
        kernel_distance(1e200 * x, x)
    for call, message in (
        (lambda: kernel_distance(x, x, subsets=0), "subsets must be at least 1"),
        (lambda: kernel_distance(x, x, subset_size=1), "subset_size must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("size", "most"), [(10, 4000), (30, 4000), (45, 4000), (30, 36)])
def test_subsets_of_one_kernel_matrix_equal_their_own(size, most, monkeypatch):
    """If it has fewer values, the kernel of all pairs is computed once; the numbers are the same."""
    real, fake = rows(60), rows(45, shift=0.5, seed=1)
    monkeypatch.setattr(kid, "_MOST", most)
    monkeypatch.setattr(kid, "_VALUES", 500)
    found = []
    for whole in (True, False):
        monkeypatch.setattr(kid, "_whole_is_cheaper", lambda *sizes, whole=whole: whole)
        found.append(kernel_distance(real, fake, subsets=7, subset_size=size))
    one, own = found
    assert (one.mean, one.std) == pytest.approx((own.mean, own.std), rel=1e-9)
    assert one.standard_error == pytest.approx(own.standard_error, rel=1e-9)


def test_the_standard_error_is_the_jackknifes():
    """Leaving out each of 12 groups of a side, drawn after the subsets."""
    x, y = rows(50), rows(40, shift=0.5, seed=1)
    found = kernel_distance(x, y, subsets=3, subset_size=20, seed=5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        torch.randperm(50, generator=generator), torch.randperm(40, generator=generator)
    sides = [side[torch.randperm(len(side), generator=generator)].tensor_split(12) for side in (x, y)]
    variance = 0.0
    for side in range(2):
        without = []
        for i in range(12):
            kept = [
                torch.cat([g for j, g in enumerate(groups) if j != i or s != side]) for s, groups in enumerate(sides)
            ]
            without.append(squared_mmd(*kept))
        variance += torch.stack(without).var(unbiased=False).item() * 11
    assert found.standard_error == pytest.approx(variance**0.5, rel=1e-9)
