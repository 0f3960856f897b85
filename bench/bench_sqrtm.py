"""tr((A B)^{1/2}) of two covariances: fastgan against scipy's Schur square root and torch's general eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Workload
from fastgan.linalg import trace_sqrt_product

QUICK_SIZES = (256,)
SIZES = (256, 1024, 2048)
SAMPLES_PER_DIMENSION = 5
CANDIDATES = 8


def workloads(quick: bool, device: str) -> list[Workload]:
    """Full rank, fewer samples than dimensions, and one reference against several candidates, for each size."""
    sizes = QUICK_SIZES if quick else SIZES
    return [make(d, device) for d in sizes for make in (full_rank, rank_deficient, many_candidates)]


def full_rank(d: int, device: str) -> Workload:
    n = SAMPLES_PER_DIMENSION * d
    a, b = (torch.cov(features(n, d, seed, device).T) for seed in (1, 2))
    return Workload(
        name=f"trace_sqrt_product-full_rank-{d}",
        implementations={
            "scipy.linalg.sqrtm": partial(scipy_trace, a, b),
            "torch.linalg.eigvals": partial(eigenvalue_trace, a, b),
            **fastgan_methods(a, b, ("auto", "cholesky", "eigh")),
        },
        reference="scipy.linalg.sqrtm",
        check=relative_error,
        parameters=parameters(d, n, 1, device),
    )


def rank_deficient(d: int, device: str) -> Workload:
    """The reference takes singular values of the features: scipy's square root of a singular product is off by 5e-5."""
    n = d // 2
    x, y = (features(n, d, seed, device) for seed in (1, 2))
    a, b = torch.cov(x.T), torch.cov(y.T)
    return Workload(
        name=f"trace_sqrt_product-rank_deficient-{d}",
        implementations={
            "singular values of features": partial(feature_trace, x, y),
            "torch.linalg.eigvals": partial(eigenvalue_trace, a, b),
            **fastgan_methods(a, b, ("auto", "svd")),
        },
        reference="singular values of features",
        check=relative_error,
        parameters=parameters(d, n, 1, device),
    )


def many_candidates(d: int, device: str) -> Workload:
    n = SAMPLES_PER_DIMENSION * d
    reference = torch.cov(features(n, d, 1, device).T)
    candidates = torch.stack([torch.cov(features(n, d, seed, device).T) for seed in range(2, 2 + CANDIDATES)])
    return Workload(
        name=f"trace_sqrt_product-one_against_{CANDIDATES}-{d}",
        implementations={
            "torch.linalg.eigvals": partial(eigenvalue_trace, reference, candidates),
            **fastgan_methods(reference, candidates, ("auto",)),
        },
        reference="torch.linalg.eigvals",
        check=relative_error,
        parameters=parameters(d, n, CANDIDATES, device),
    )


def features(n: int, d: int, seed: int, device: str) -> Tensor:
    """(n, d) float64 with standard deviations from 1 to 1e-2, mixed by an orthogonal matrix of its own."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, -2, d, dtype=torch.float64)
    samples = torch.randn(n, d, generator=generator, dtype=torch.float64) * scales
    return (samples @ rotation).to(device)


def fastgan_methods(a: Tensor, b: Tensor, methods: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    return {f"fastgan {method}": partial(trace_sqrt_product, a, b, method=method) for method in methods}


def scipy_trace(a: Tensor, b: Tensor) -> Tensor:
    import scipy.linalg

    return torch.tensor(scipy.linalg.sqrtm((a @ b).cpu().numpy()).trace().real)


def eigenvalue_trace(a: Tensor, b: Tensor) -> Tensor:
    """What torchmetrics does."""
    return torch.linalg.eigvals(a @ b).sqrt().real.sum(-1)


def feature_trace(x: Tensor, y: Tensor) -> Tensor:
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    return torch.linalg.svdvals(centred_x @ centred_y.T).sum() / ((len(x) - 1) * (len(y) - 1)) ** 0.5


def relative_error(result: Tensor, reference: Tensor) -> float:
    return ((result.cpu() - reference.cpu()).abs() / reference.cpu()).max().item()


def parameters(d: int, n: int, candidates: int, device: str) -> dict[str, Any]:
    return {"d": d, "n": n, "candidates": candidates, "dtype": "float64", "device": device}
