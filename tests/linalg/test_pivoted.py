import pytest
import torch

from fastgan import backend
from fastgan.linalg._pivoted import pivot_floor, pivoted_cholesky, semidefinite_rows
from tests.linalg.spectra import covariance, covariance_of_rank

EXTENSION = pytest.param(
    lambda a: torch.ops.fastgan_C.pivoted_cholesky(a),
    id="extension",
    marks=pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built"),
)
IMPLS = [EXTENSION, pytest.param(pivoted_cholesky, id="reference")]


@pytest.mark.parametrize("compute", IMPLS)
@pytest.mark.parametrize(("n", "d"), [(2, 2), (9, 40), (64, 65), (65, 200), (129, 130), (300, 150)])
def test_rank_and_factor(n, d, compute):
    _, a = covariance_of_rank(n, d, seed=n)
    rows, order, remainder = compute(a)
    rank = min(n - 1, d)  # centered
    assert rows.shape == (rank, d)
    assert sorted(order.tolist()) == list(range(d))
    assert remainder.item() <= pivot_floor(a) / 8
    assert (rows.mT @ rows - a).abs().max() <= 1e-14 * a.abs().max()
    pivots = rows[:, order].diagonal()
    assert (pivots[:-1] >= pivots[1:]).all()
    assert not rows[:, order].tril(-1).any()
    assert (rows[:, order].abs() <= pivots[:, None] * (1 + 1e-12)).all()  # complete pivoting


@pytest.mark.parametrize("compute", IMPLS)
def test_exact_cases(compute):
    a = torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 9.0]]).double()
    rows, order, remainder = compute(a)
    assert torch.equal(rows, torch.tensor([[0.0, 0.0, 3.0], [2.0, 1.0, 0.0]]).double())
    assert order.tolist() == [2, 0, 1]
    assert remainder.item() == 0
    rows, order, remainder = compute(torch.zeros(3, 3, dtype=torch.float64))
    assert rows.shape == (0, 3)
    assert order.tolist() == [0, 1, 2]
    assert remainder.item() == 0


@pytest.mark.parametrize("compute", IMPLS)
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_remainder_reveals_an_indefinite_matrix(compute, scale):
    indefinite = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.5], [0.0, 0.5, 0.0]]).double() * scale
    assert compute(indefinite)[2].item() == 0.5 * scale
    negative = torch.diag(torch.tensor([1.0, -2.0])).double() * scale
    assert compute(negative)[2].item() == 2 * scale
    impl = "reference" if compute is pivoted_cholesky else "extension"
    assert semidefinite_rows(indefinite, impl) is None
    assert semidefinite_rows(negative, impl) is None
    rows, order = semidefinite_rows(torch.diag(torch.tensor([1.0, 0.0])).double() * scale, impl)
    assert rows.shape == (1, 2)
    assert order.tolist() == [0, 1]


@pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")
@pytest.mark.parametrize("a", [covariance(130), covariance_of_rank(70, 300, 0)[1].mT], ids=["definite", "singular"])
def test_extension_equals_reference(a):
    before = a.clone()
    (rows, order, _), (expected, expected_order, _) = torch.ops.fastgan_C.pivoted_cholesky(a), pivoted_cholesky(a)
    assert torch.equal(a, before)
    assert torch.equal(order, expected_order)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-11 * expected.abs().max().item())
