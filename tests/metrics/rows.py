"""Random features and their statistics, and pairs of features that no metric takes."""

import torch

from fastgan.metrics import FeatureStats


def rows(n, dim=8, seed=0, shift=0.0, dtype=torch.float64):
    return (torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift).to(dtype)


def stats(n, seed=0, dim=8, shift=0.0):
    return FeatureStats().update(rows(n, dim, seed, shift))


UNUSABLE_PAIRS = [
    (rows(5, 6), rows(5, 4), "real and fake must have features of one dim, got 6 and 4"),
    (rows(1), rows(5), "real must have at least 2 feature vectors, it has 1"),
    (rows(5), torch.full((5, 8), float("nan")), "fake must be finite"),
    (rows(5), torch.zeros(5, 8, dtype=torch.int64), "fake must be floating-point features"),
    (rows(5)[0], rows(5), "real must be floating-point features"),
]
