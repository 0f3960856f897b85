"""Many distances in one call, the extrapolated one with its error, and the distance as a loss."""

import pytest
import torch

from fastgan.linalg import trace_sqrt_product, trace_sqrt_product_from_factors
from fastgan.metrics import FeatureStats, InputError, frechet_distance
from fastgan.metrics._fid_infinity import _covariance_gradient, _trace_gradient, fid_infinity
from fastgan.metrics.frechet_loss import FrechetLoss
from fastgan.metrics.frechet_many import frechet_distances, paired_frechet_distances
from tests.linalg.spectra import count_factorisations


def rows(n, dim=8, seed=0, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def stats(n, seed=0, dim=8, shift=0.0):
    return FeatureStats().update(rows(n, dim, seed, shift))


@pytest.mark.parametrize("reference", [50, 6])
def test_many_against_one_equal_one_by_one(reference, monkeypatch):
    monkeypatch.setattr("fastgan.metrics.frechet_many._MATRIX_BYTES", 2 * 8 * 8 * 8)  # two covariances at a time
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
    monkeypatch.setattr("fastgan.metrics.frechet_many._MATRIX_BYTES", 2 * 8 * 8 * 8)
    many = [stats(n, seed) for seed, n in enumerate((30, 5, 40, 6, 60, 5), start=1)]
    one = stats(50)
    assert count_factorisations(lambda: frechet_distances(one, many)) == 1
    expected = frechet_distances(one, many)
    stats(50).save(tmp_path / "with.npz", root=True)
    for known in (one, FeatureStats.load(tmp_path / "with.npz")):
        assert count_factorisations(lambda known=known: frechet_distances(known, many)) == 0
        torch.testing.assert_close(frechet_distances(known, many), expected, rtol=1e-12, atol=1e-12)
        assert count_factorisations(lambda known=known: [frechet_distance(known, c) for c in many]) == 0
        assert count_factorisations(lambda known=known: [frechet_distance(c, known) for c in many]) == 0
        assert frechet_distance(known, many[0]) == pytest.approx(expected[0].item(), rel=1e-9)
    one.update(rows(3, seed=9))
    assert one.known_root is None
    assert count_factorisations(lambda: frechet_distances(one, many)) == 1
    other = frechet_distance(one, many[0])
    assert other == pytest.approx(frechet_distance(one, many[0], method="full"), rel=1e-9)
    assert other != pytest.approx(expected[0].item(), rel=1e-3)


def test_candidates_of_one_size_are_one_call(monkeypatch):
    calls = []

    def spy(f, g=None, *, cov=None):
        calls.append(tuple(None if x is None else tuple(x.shape) for x in (f, g, cov)))
        return trace_sqrt_product_from_factors(f, g, cov=cov)

    monkeypatch.setattr("fastgan.metrics.frechet_many.trace_sqrt_product_from_factors", spy)
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
    monkeypatch.setattr("fastgan.metrics.frechet_many._MATRIX_BYTES", 3 * 8 * 7 * 7)
    sizes = ((5, 7), (2, 2), (30, 4), (40, 50), (7, 7), (3, 6), (8, 5))
    real = [stats(n, seed) for seed, (n, _) in enumerate(sizes)]
    fake = [stats(n, 50 + seed, shift=0.3) for seed, (_, n) in enumerate(sizes)]
    expected = [frechet_distance(a, b) for a, b in zip(real, fake, strict=True)]
    torch.testing.assert_close(
        paired_frechet_distances(real, fake), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10
    )
    with pytest.raises(InputError, match="pair 2: at least 2"):
        paired_frechet_distances([*real[:2], stats(1)], fake[:3])


def test_infinity_is_unbiased_and_its_error_is_right():
    """Of 30 samples of a known distance: the mean is right where the plain one is far off, and errors are of size 1."""
    dim, n = 16, 400
    reference = FeatureStats.from_moments(torch.zeros(dim), torch.eye(dim))
    exact = 16 * 0.3**2 + 16 * (1.2 - 1) ** 2
    found = [fid_infinity(1.2 * rows(n, dim, seed) + 0.3, reference, seed=seed) for seed in range(30)]
    values = torch.tensor([result.value for result in found], dtype=torch.float64)
    plain_bias = torch.tensor([result.distance for result in found], dtype=torch.float64).mean() - exact
    assert abs(values.mean() - exact) < 0.25 * plain_bias
    errors = (values - exact) / torch.tensor([result.standard_error for result in found], dtype=torch.float64)
    assert 0.6 < errors.square().mean().sqrt() < 1.6
    assert found[0].distance == pytest.approx(
        frechet_distance(reference, FeatureStats().update(1.2 * rows(n, dim) + 0.3))
    )


def test_the_gradient_behind_the_error_is_the_distances():
    a, b = stats(40), stats(30, seed=1)
    cov = a.cov.requires_grad_()
    (expected,) = torch.autograd.grad(cov.trace() - 2 * trace_sqrt_product(cov, b.cov), cov)
    torch.testing.assert_close(_covariance_gradient(a.cov, b.cov), expected, rtol=1e-9, atol=1e-12)
    singular = stats(5).cov
    torch.testing.assert_close(
        _covariance_gradient(singular, b.cov), torch.eye(8, dtype=torch.float64) - 2 * _trace_gradient(singular, b.cov)
    )


def test_infinity_is_seeded_and_needs_enough():
    reference, x = stats(100), rows(100, seed=3)
    assert fid_infinity(x, reference, seed=1) == fid_infinity(x, reference, seed=1)
    assert fid_infinity(x, reference, seed=1).value != fid_infinity(x, reference, seed=2).value
    with pytest.raises(InputError, match="at least 24 feature vectors, it has 23"):
        fid_infinity(x[:23], reference)
    with pytest.raises(InputError, match="differ in backbone"):
        fid_infinity(x, FeatureStats(backbone="inception").update(x), backbone="other")


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
