"""FLD against the paper's and the authors' code's formulas, with the gradients of autograd."""

import math

import numpy as np
import pytest
import torch

from fastgan._checks import InputError
from fastgan.metrics import _fld, fld
from tests.metrics.rows import rows

BATCH = 50


def squared(x, y):
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2


def log_normal(squares, log_variance, dim):
    return -0.5 * squares / log_variance.exp() - dim / 2 * (log_variance + math.log(2 * math.pi))


def fit(centers, x, random):
    """Adam on the log-variances, a background component around the mean beside, at most 50 epochs."""
    x = x[random.choice(len(x), len(x), replace=False)]
    dim = x.shape[1]
    of_centers = ((squared(x, centers).amin(0) + 1e-3) / dim).log().requires_grad_()
    background = torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([of_centers, background], lr=0.5)
    mean, losses = x.mean(0, keepdim=True), []
    for epoch in range(50):
        found = []
        for batch in x.split(BATCH):
            optimizer.zero_grad()
            terms = log_normal(squared(batch, centers), of_centers, dim) - math.log(len(centers))
            beside = log_normal(0.9**2 * squared(batch, mean), background, dim)
            loss = -torch.cat([terms, beside], 1).logsumexp(1).mean() / dim
            loss.backward()
            optimizer.step()
            of_centers.data.clamp_(-40, 40)
            found.append(loss.item())
        losses.append(sum(found) / len(found))
        if epoch > 5 and max(abs(losses[-1] - losses[-j]) for j in range(1, 6)) < 5e-4:
            break
    return of_centers.detach()


def nll(x, centers, log_variances):
    terms = log_normal(squared(x, centers), log_variances, x.shape[1]) - math.log(len(centers))
    return (-terms.logsumexp(1) / x.shape[1]).mean().item()


def expected(train, test, fake, evaluate, gen_size, seed):
    random = np.random.RandomState(seed)
    if len(fake) > gen_size:
        fake = fake[random.choice(len(fake), gen_size, replace=False)]
    train, test, fake = ((x - test.mean(0)) / test.std(0) for x in (train, test, fake))
    log_variances = fit(fake, train, random)
    if evaluate == "gap":
        return 100 * (nll(train, fake, log_variances) - nll(test, fake, log_variances))
    value = nll(test if evaluate == "test" else train, fake, log_variances)
    train = train[random.choice(len(train), len(train), replace=False)]
    size = min(len(fake), len(train) // 2)
    return 100 * (value - nll(test, train[:size], fit(train[:size], train[size:], random)))


@pytest.mark.parametrize(("evaluate", "gen_size", "kept"), [("test", 100, 0), ("train", 60, 1 << 20), ("gap", 100, 0)])
def test_is_its_formula(monkeypatch, evaluate, gen_size, kept):
    """In several batches and blocks, with distances kept and not."""
    monkeypatch.setattr(_fld, "_BATCH", BATCH)
    monkeypatch.setattr(_fld, "_BLOCK", 32)
    monkeypatch.setattr(_fld, "_MOST_KEPT", kept)
    train, test, fake = rows(120, 6), rows(70, 6, seed=1), rows(80, 6, seed=2, shift=0.5)
    fake = torch.cat([fake, train[:10]])
    value = fld(train, test, fake, evaluate=evaluate, gen_size=gen_size, seed=3)
    assert value == pytest.approx(expected(train, test, fake, evaluate, gen_size, 3), rel=1e-8)


def test_tells_copies_from_new_vectors():
    """float32 in; a perfect generator has about 0, one that copies a large value and a negative gap."""
    train, test, fake = (rows(400, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    assert abs(fld(train, test, fake)) < 10
    assert fld(train, test, train + 1e-4) > 100
    assert fld(train, test, train + 1e-4, evaluate="gap") < -100
    assert fld(train, test, fake + 2) > fld(train, test, fake)


def test_wrong_arguments():
    x = rows(8)
    for sets, options, error, message in (
        ((x, x, x), {"evaluate": "all"}, ValueError, "evaluate must be one of test, train, gap"),
        ((x, x, x), {"gen_size": 1}, ValueError, "gen_size must be at least 2"),
        ((x[:3], x, x), {}, InputError, "train must have at least 4 feature vectors, it has 3"),
        ((x, x[:, :2], x), {}, InputError, "one dim"),
        ((x, x * torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1]), x), {}, InputError, "feature 1 is constant"),
    ):
        with pytest.raises(error, match=message):
            fld(*sets, **options)
