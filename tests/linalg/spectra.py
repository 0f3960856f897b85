"""Covariances with a known spectrum, for the tests of matrix square roots."""

import math

import pytest
import torch
from torch import Tensor

from fastgan import backend

SIZES = (1, 2, 3, 31, 64, 65, 192)
SPECTRA = ("flat", "geometric", "dominant", "clustered", "singular", "repeated")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
IMPLS = [
    pytest.param(
        "extension", marks=pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")
    ),
    "reference",
]


def spectrum(name: str, d: int) -> Tensor:
    steps = torch.arange(d, dtype=torch.float64) / max(d - 1, 1)
    values = {
        "flat": torch.ones_like(steps),
        "geometric": 10 ** (-8 * steps),
        "dominant": 1e-3 ** (steps > 0),
        "clustered": (1 + 1e-9 * torch.rand_like(steps)) * 1e-4 ** (steps >= 0.5),
        "singular": (0.1 + torch.rand_like(steps)) * (steps <= 0.5),
        "repeated": 0.25 ** (steps >= 0.4),
    }
    return values[name].double()


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


def factor(name: str, d: int) -> Tensor:
    """F of A = F F^T with the named spectrum, in directions of its own."""
    return rotation(d) * spectrum(name, d).sqrt()


def covariance(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A well-conditioned positive definite matrix (*shape, d), d the last of ``shape``."""
    x = torch.randn(*shape, 2 * shape[-1] + 5, dtype=torch.float64)
    return (x @ x.mT / x.shape[-1]).to(dtype)


def nuclear_norm(factor_a: Tensor, factor_b: Tensor) -> Tensor:
    """tr((A B)^{1/2}) of A = F F^T and B = H H^T: the oracle."""
    return torch.linalg.svdvals(factor_a.mT @ factor_b).sum(-1)


def eigen_factor(matrices: Tensor) -> Tensor:
    """F of the positive part F F^T of symmetric matrices: rounding to float32 leaves eigenvalues of either sign."""
    values, vectors = torch.linalg.eigh(0.5 * (matrices + matrices.mT))
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).abs() / truth).max().item()


def covariance_of_rank(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features X (n, d) with standard deviations from 1 to 1e-2, centered, over sqrt(n - 1); and their covariance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)
    x = (x - x.mean(0)) / math.sqrt(n - 1)
    return x, x.mT @ x


def count_factorizations(call) -> int:
    """Cholesky factorizations, in the extension too: it calls them through the dispatcher."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::linalg_cholesky_ex")
