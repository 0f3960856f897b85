"""The distance against scipy's and against closed forms; low-rank against full; many in one call; as a loss."""

import numpy as np
import pytest
import torch

from fastgan.linalg import trace_sqrt_product_from_factors
from fastgan.metrics import (
    FeatureStats,
    FrechetLoss,
    InputError,
    frechet_distance,
    frechet_distances,
    paired_frechet_distances,
)
from tests.linalg.spectra import count_factorizations
from tests.metrics.rows import rows, stats


def sample(n, dim, seed, decay=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -decay, dim, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    rows = torch.randn(n, dim, generator=generator, dtype=torch.float64) * scales @ mixing + 0.1 * seed
    return FeatureStats().update(rows.to(dtype))


@pytest.mark.parametrize(("n1", "n2", "dim"), [(200, 300, 16), (100, 90, 1), (500, 400, 65)])
def test_equals_scipy(n1, n2, dim):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = sample(n1, dim, 1), sample(n2, dim, 2)
    s1, s2 = a.cov.numpy(), b.cov.numpy()
    cross = np.trace(np.real(linalg.sqrtm(s1 @ s2)))
    expected = np.square((a.mean - b.mean).numpy()).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance((a.mean, a.cov), (b.mean.numpy(), s2)) == pytest.approx(expected, rel=1e-10)


def test_closed_form_of_commuting_covariances():
    d1, d2 = np.array([4.0, 9.0, 0.0, 1e-8]), np.array([1.0, 16.0, 25.0, 1e8])
    m1, m2 = np.array([1.0, 0, 0, 2]), np.array([0.0, 0, 3, 2])
    expected = np.square(m1 - m2).sum() + np.square(np.sqrt(d1) - np.sqrt(d2)).sum()
    assert frechet_distance((m1, np.diag(d1)), (m2, np.diag(d2))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 3.0])
@pytest.mark.parametrize(
    ("n1", "n2", "dim"),
    [(20, 30, 48), (48, 48, 48), (2, 2, 48), (2, 47, 48), (20, 200, 48), (200, 20, 48), (5, 49, 48), (31, 100, 64)],
)
def test_low_rank_equals_full(n1, n2, dim, decay):
    a, b = sample(n1, dim, 1, decay), sample(n2, dim, 2, decay)
    low_rank = frechet_distance(a, b, method="low_rank")
    assert low_rank == pytest.approx(frechet_distance(a, b, method="full"), rel=1e-9)
    assert frechet_distance(a, b) == low_rank


def test_low_rank_with_repeated_vectors_and_a_singular_other_side():
    row = sample(6, 20, 1).factor
    a = FeatureStats().update(torch.cat([row, row]))  # rank 5 of 12 vectors
    wide = sample(8, 20, 2).factor
    b = FeatureStats().update(wide.repeat(5, 1))  # 40 vectors, no longer held, rank 7
    assert b.factor is None
    expected = a.cov.trace() + b.cov.trace() + (a.mean - b.mean).square().sum()
    expected -= 2 * torch.linalg.svdvals(a.factor @ wide.T).sum() * (5 / (11 * 39)) ** 0.5
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("n", [10, 40])
def test_a_set_against_itself_is_zero(n):
    a = sample(n, 24, 1)
    assert 0.0 <= frechet_distance(a, a) < 1e-12 * a.cov.trace().item()


@pytest.mark.parametrize(("n1", "n2"), [(10, 40), (40, 50), (10, 12)])
def test_symmetry_and_scale(n1, n2):
    a, b = sample(n1, 24, 1), sample(n2, 24, 2)
    value = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-12)
    for scale in (1e-6, 1e6):
        scaled = [(s.mean * scale, s.cov * scale**2) for s in (a, b)]
        assert frechet_distance(*scaled) == pytest.approx(value * scale**2, rel=1e-9)


def test_merged_parts_give_the_value_of_the_whole():
    a, b = sample(100, 12, 1), sample(80, 12, 2)
    rows = torch.randn(80, 12, dtype=torch.float64)
    whole = FeatureStats().update(rows)
    parts = FeatureStats().update(rows[:7]).merge(FeatureStats().update(rows[7:]))
    assert frechet_distance(a, parts) == pytest.approx(frechet_distance(a, whole), rel=1e-12)
    assert frechet_distance(a, b) != pytest.approx(frechet_distance(a, whole), rel=1e-3)


def test_refused():
    a = sample(30, 8, 1)
    with pytest.raises(InputError, match="differ in dim: 8 and 9"):
        frechet_distance(a, sample(30, 9, 1))
    with pytest.raises(ValueError, match="method must be one of 'auto', 'low_rank', 'full', got 'fast'"):
        frechet_distance(a, a, method="fast")
    with pytest.raises(ValueError, match="method='low_rank' needs a side"):
        frechet_distance(a, a, method="low_rank")
    with pytest.raises(InputError, match="b must have at least 2 feature vectors for a covariance, it has 1"):
        frechet_distance(a, sample(1, 8, 1))
    with pytest.raises(InputError, match="a must have at least 2 feature vectors for a covariance, it has 0"):
        frechet_distance(FeatureStats(), a)
    with pytest.raises(TypeError, match="a must be FeatureStats or a pair"):
        frechet_distance(a.cov, a)
    indefinite = torch.ones(8, 8, dtype=torch.float64) * 2 - torch.eye(8, dtype=torch.float64)
    with pytest.raises(InputError, match="no covariance"):
        frechet_distance((torch.zeros(8), indefinite), a)


@pytest.mark.parametrize("what", ["backbone", "resize"])
def test_different_features_are_not_compared(what):
    a, b = sample(30, 8, 1), sample(30, 8, 2)
    setattr(a, what, "one")
    unknown = frechet_distance(a, b)
    setattr(b, what, "two")
    with pytest.raises(InputError, match=f"differ in {what}: one and two"):
        frechet_distance(a, b)
    setattr(b, what, "one")
    assert frechet_distance(a, b) == unknown


@pytest.mark.parametrize("reference", [50, 6])
def test_many_against_one_equal_one_by_one(reference, monkeypatch):
    monkeypatch.setattr("fastgan.metrics.frechet._MATRIX_BYTES", 2 * 8 * 8 * 8)  # two covariances at a time
    one = stats(reference)
    many = [stats(n, seed, shift=0.1 * seed) for seed, n in enumerate((30, 5, 40, 8, 60, 9), start=1)]
    expected = torch.tensor([frechet_distance(one, other) for other in many], dtype=torch.float64)
    torch.testing.assert_close(frechet_distances(one, many), expected, rtol=1e-9, atol=1e-10)
    assert frechet_distances(one, []).shape == (0,)
    with pytest.raises(InputError, match="candidate 1: the two statistics differ in dim: 8 and 5"):
        frechet_distances(one, [many[0], stats(9, dim=5)])
    with pytest.raises(InputError, match="candidate 0: at least 2 feature vectors"):
        frechet_distances(one, [stats(1)])


def test_the_reference_is_factored_once_and_a_known_root_never(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.metrics.frechet._MATRIX_BYTES", 2 * 8 * 8 * 8)
    many = [stats(n, seed) for seed, n in enumerate((30, 5, 40, 6, 60, 5), start=1)]
    one = stats(50)
    assert count_factorizations(lambda: frechet_distances(one, many)) == 1
    expected = frechet_distances(one, many)
    stats(50).save(tmp_path / "with.npz", root=True)
    for known in (one, FeatureStats.load(tmp_path / "with.npz")):
        assert count_factorizations(lambda known=known: frechet_distances(known, many)) == 0
        torch.testing.assert_close(frechet_distances(known, many), expected, rtol=1e-12, atol=1e-12)
        assert count_factorizations(lambda known=known: [frechet_distance(known, c) for c in many]) == 0
        assert count_factorizations(lambda known=known: [frechet_distance(c, known) for c in many]) == 0
        assert frechet_distance(known, many[0]) == pytest.approx(expected[0].item(), rel=1e-9)
    one.update(rows(3, seed=9))
    assert one.known_root is None
    assert count_factorizations(lambda: frechet_distances(one, many)) == 1
    other = frechet_distance(one, many[0])
    assert other == pytest.approx(frechet_distance(one, many[0], method="full"), rel=1e-9)
    assert other != pytest.approx(expected[0].item(), rel=1e-3)


def test_candidates_of_one_size_are_one_call(monkeypatch):
    calls = []

    def spy(f, g=None, *, cov=None):
        calls.append(tuple(None if x is None else tuple(x.shape) for x in (f, g, cov)))
        return trace_sqrt_product_from_factors(f, g, cov=cov)

    monkeypatch.setattr("fastgan.metrics.frechet.trace_sqrt_product_from_factors", spy)
    frechet_distances(stats(50), [stats(n, seed) for seed, n in enumerate((5, 7, 30, 5, 20, 5))])
    assert calls == [((3, 5, 8), (8, 8), None), ((1, 7, 8), (8, 8), None), ((8, 8), None, (2, 8, 8))]


@pytest.mark.parametrize("n", [4, 30])
def test_a_singular_reference_of_many(n):
    """Features of rank 5 or below in 8 dimensions, also where there are more vectors than dimensions."""
    reference = FeatureStats().update(rows(n, 5) @ rows(5, 8, seed=3))
    many = [stats(n, seed) for seed, n in enumerate((30, 5, 40, 12), start=1)]
    many.append(FeatureStats().update(rows(30, 3, seed=4) @ rows(3, 8, seed=5)))
    expected = [frechet_distance(reference, other, method="full") for other in many]
    root = reference.root()
    assert root.shape == (min(n, 5), 8)
    torch.testing.assert_close(root.mT @ root, reference.cov, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        frechet_distances(reference, many), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_pairs_equal_one_by_one(monkeypatch):
    monkeypatch.setattr("fastgan.metrics.frechet._MATRIX_BYTES", 3 * 8 * 7 * 7)
    sizes = ((5, 7), (2, 2), (30, 4), (40, 50), (7, 7), (3, 6), (8, 5))
    real = [stats(n, seed) for seed, (n, _) in enumerate(sizes)]
    fake = [stats(n, 50 + seed, shift=0.3) for seed, (_, n) in enumerate(sizes)]
    expected = [frechet_distance(a, b) for a, b in zip(real, fake, strict=True)]
    torch.testing.assert_close(
        paired_frechet_distances(real, fake), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10
    )
    with pytest.raises(InputError, match="pair 2: at least 2"):
        paired_frechet_distances([*real[:2], stats(1)], fake[:3])


@pytest.mark.parametrize("n", [5, 30])
@pytest.mark.parametrize("reference", [50, 4])
def test_the_loss_is_the_distance_and_has_its_gradient(n, reference):
    target = stats(reference)
    loss = FrechetLoss(target)
    x = rows(n, seed=2, shift=0.5).requires_grad_()
    assert loss(x).item() == pytest.approx(frechet_distance(target, FeatureStats().update(x.detach())), rel=1e-6)
    if reference > 8:  # in the directions that a singular reference lacks, the distance has no derivative
        torch.autograd.gradcheck(loss, (x,))
    assert loss(x.float()).dtype == torch.float32


def test_descending_the_loss_approaches_the_reference():
    loss = FrechetLoss(stats(200))
    x = rows(40, seed=2, shift=1.0).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=5.0)
    before = loss(x).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    assert loss(x).item() < 0.01 * before
    with pytest.raises(InputError, match=r"features must have shape \(n, 8\) with n >= 2, got \(1, 8\)"):
        loss(x[:1])
