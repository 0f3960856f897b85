"""MiFID, AuthPct, C_T, Vendi and CMMD: against their definitions, written out, and torchmetrics and SciPy."""

import numpy as np
import pytest
import torch

from fastgan._checks import InputError
from fastgan.metrics import auth_pct, cmmd, ct_score, mifid, squared_mmd, vendi_score
from fastgan.metrics.kid import gaussian


def rows(n, dim=5, shift=0.0, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)) + shift


def distances(x, y):
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def test_cmmd_is_its_published_formula():
    """The double sums of google-research/cmmd, on unit vectors."""
    x, y = (rows(13), rows(11, shift=1.0, seed=1))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    gamma = 1 / (2 * 10**2)
    kxx, kyy, kxy = (np.exp(-gamma * distances(a, b) ** 2).mean() for a, b in ((x, x), (y, y), (x, y)))
    expected = 1000 * (kxx + kyy - 2 * kxy)
    assert cmmd(3 * x, y) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


def test_any_kernel():
    x, y = torch.from_numpy(rows(9)), torch.from_numpy(rows(7, seed=1))

    def kernel(a, b):
        return gaussian(a, b, sigma=2.0)

    kxx, kyy, kxy = (np.exp(-(distances(a.numpy(), b.numpy()) ** 2) / 8) for a, b in ((x, x), (y, y), (x, y)))
    unbiased = (kxx.sum() - 9) / 72 + (kyy.sum() - 7) / 42 - 2 * kxy.mean()
    assert squared_mmd(x, y, kernel).item() == pytest.approx(unbiased, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_mifid_is_torchmetrics(shift):
    theirs = pytest.importorskip("torchmetrics.image.mifid")
    x, y = (torch.from_numpy(z) for z in (rows(60) + shift, rows(40, seed=1) + shift))
    expected = theirs._mifid_compute(y.mean(0), y.T.cov(), y, x.mean(0), x.T.cov(), x, cosine_distance_eps=0.1).item()
    assert mifid(x, y) == pytest.approx(expected, rel=1e-5)
    assert mifid(x, x[:40] + 1e-3) > 100 * mifid(x, y) or shift


def test_a_set_has_no_distance_from_itself():
    """MiFID divides the rounding of 0 by 1e-15."""
    for n, dim in ((20, 64), (40, 7)):
        x = 100 * rows(n, dim)
        assert mifid(x, x) == 0
    assert mifid(x, x[:30]) > 0


def test_the_vendi_score_of_repeated_vectors():
    """Their eigenvalues of 0, of which a Gram matrix has the rounding, count in an order of 1/2."""
    x = rows(60, 128)
    unit = np.concatenate([x / np.linalg.norm(x, axis=1, keepdims=True)] * 3)
    expected = np.linalg.svd(unit / len(unit) ** 0.5, compute_uv=False).sum() ** 2
    assert vendi_score(unit, q=0.5) == pytest.approx(expected, rel=1e-10)


def test_auth_pct_is_its_definition():
    x, y = rows(30), np.concatenate([rows(10, seed=1), rows(30)[:6] + 1e-4])
    among = distances(x, x)
    np.fill_diagonal(among, np.inf)
    between = distances(y, x)
    authentic = [between[i].min() > among[between[i].argmin()].min() for i in range(len(y))]
    assert auth_pct(x, y) == pytest.approx(100 * np.mean(authentic))
    assert auth_pct(x, x + 1e-6) == 0
    assert auth_pct(x, x + 100) == 100


@pytest.mark.parametrize("split", [False, True])
def test_ct_score_is_its_definition(split):
    stats = pytest.importorskip("scipy.stats")
    train, test, fake = rows(50), rows(40, seed=1), rows(30, seed=2)
    together = np.concatenate([train, test, fake])
    cells = (together[:, 0] > 0).astype(int) * split
    parts = np.split(cells, [50, 90])
    expected = 0.0
    for cell in np.unique(cells):
        a, b, c = (z[part == cell] for z, part in zip((train, test, fake), parts, strict=True))
        to_train = [distances(z, a).min(1) for z in (c, b)]
        u = stats.mannwhitneyu(*to_train).statistic
        m, n = len(c), len(b)
        expected += n / 40 * (u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12)
    assert ct_score(train, test, fake, cells=torch.from_numpy(cells)) == pytest.approx(expected, rel=1e-9)
    assert ct_score(train, test, train[:30] + 1e-5) < -4
    assert abs(ct_score(train, test, fake)) < 3


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, float("inf")])
@pytest.mark.parametrize("shape", [(8, 3), (4, 9)])
def test_vendi_is_its_definition(q, shape):
    x = rows(*shape)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    p = np.linalg.eigvalsh(unit @ unit.T / len(x))
    p = p[p > 1e-12]
    expected = {1.0: lambda: np.exp(-(p * np.log(p)).sum()), float("inf"): lambda: 1 / p.max()}.get(
        q, lambda: (p**q).sum() ** (1 / (1 - q))
    )()
    assert vendi_score(x, q=q) == pytest.approx(expected, rel=1e-6)
    assert 1 <= vendi_score(x, q=q) <= min(shape)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_directions_do_not_depend_on_lengths(scale):
    """Squares of which a float64 does not hold: the values are those of the same directions."""
    x, y = rows(13), rows(11, shift=1.0, seed=1)
    assert vendi_score(scale * x) == pytest.approx(vendi_score(x), rel=1e-12)
    assert cmmd(scale * x, scale * y) == pytest.approx(cmmd(x, y), rel=1e-9)


def test_wrong_arguments():
    x = rows(5)
    for call, error, message in (
        (lambda: mifid(x, x, cosine_distance_eps=0), ValueError, "cosine_distance_eps"),
        (lambda: vendi_score(x, q=0), ValueError, "q must be positive"),
        (lambda: vendi_score(np.zeros((3, 2))), InputError, "zeros"),
        (lambda: auth_pct(x, x[:, :3]), InputError, "one dim"),
        (lambda: cmmd(x, np.full_like(x, np.nan)), InputError, "fake must be finite"),
        (lambda: mifid(np.zeros_like(x), x), InputError, "real must hold a vector whose entries do not sum to 0"),
        (lambda: ct_score(x, x, x, cells=torch.zeros(3)), InputError, "cells must have shape"),
    ):
        with pytest.raises(error, match=message):
            call()
