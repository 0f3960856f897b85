"""Matrix square roots: fastgan against scipy's Schur method, torch's eigensolvers and plain Newton-Schulz.

The time that unsymmetric eigensolvers take depends on the spectra, fastgan's does not: ``full_rank``, two samples of
one population with eigenvalues down to 1e-6, is hard for them, ``unrelated`` is easy. Features of photographs, whose
eigenvalues span as much, were found nearer to ``unrelated`` (EfficientNet's, 1280 dimensions).

Errors are relative to the workload's reference. If affordable, that is the singular values of factors, which keep all
digits for any spectrum. Inputs are made when a workload is first run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgan import backend_status
from fastgan.bench import Workload, relative_difference, relative_norm
from fastgan.linalg import sqrtm, trace_sqrt_product, trace_sqrt_product_from_factors

QUICK_SIZE = 256
SAMPLES = {256: 1280, 768: 3840, 2048: 10000}
CLASS_SAMPLES = 50
SLOW_ON_A_CPU = 768
"""Above this size the methods made of matrix products take too long on a CPU."""

ONCE_ABOVE = 1.5  # seconds
FACTORS = "singular values of Cholesky factors"
FEATURES = "singular values of features"


def workloads(quick: bool, device: str) -> Iterator[Workload]:
    for d in (QUICK_SIZE,) if quick else (768, 2048):
        yield full_rank(d, device)
        yield unrelated(d, device)
        yield rank_deficient(d, device)
        yield many_candidates(4 if d == 2048 else 8, d, device)
    yield many_classes(50 if quick else 1000, QUICK_SIZE if quick else 2048, device)
    for d in (32, 128, 256):
        yield many_pairs((100 if quick else 250) * 32 // d, d, device)
    yield full_root(QUICK_SIZE if quick else 768, device)


def full_rank(d: int, device: str) -> Workload:
    """Covariances of two large samples of one population."""
    pair = partial(two_samples, SAMPLES[d], d, device)

    def from_root() -> Tensor:
        return trace_sqrt_product_from_factors(saved_root(SAMPLES[d], d, device), cov=pair()[1])

    methods = ["auto", "cholesky", "eigh", "svd"]
    implementations = {
        FACTORS: lambda: factor_trace(*pair()),
        "scipy.linalg.sqrtm": lambda: scipy_trace(*pair()),
        "torch.linalg.eigvals": lambda: eigenvalue_trace(*pair()),
        "torch.linalg.eigh and eigvalsh": lambda: eigh_trace(*pair()),
        "fastgan, root of one saved": from_root,
    }
    if device == "cuda" or d <= SLOW_ON_A_CPU:
        methods.append("polar")
        implementations["newton-schulz, eager torch"] = lambda: newton_schulz_trace(*pair())
        implementations["fastgan polar, float32"] = lambda: trace_sqrt_product(*single(*pair()), method="polar")
    implementations |= fastgan_methods(pair, methods)
    return workload("full_rank", d, SAMPLES[d], 1, device, implementations, FACTORS)


def unrelated(d: int, device: str) -> Workload:
    """Covariances of two unrelated populations, with eigenvalues down to 1e-4 of the largest."""

    def pair() -> tuple[Tensor, Tensor]:
        a, b = (covariance(SAMPLES[d], d, seed, device, population=seed, smallest=1e-2) for seed in (1, 2))
        return a, b

    implementations = {
        FACTORS: lambda: factor_trace(*pair()),
        "scipy.linalg.sqrtm": lambda: scipy_trace(*pair()),
        "torch.linalg.eigvals": lambda: eigenvalue_trace(*pair()),
        "torch.linalg.eigh and eigvalsh": lambda: eigh_trace(*pair()),
        **fastgan_methods(pair, ["auto"]),
    }
    return workload("unrelated", d, SAMPLES[d], 1, device, implementations, FACTORS)


def rank_deficient(d: int, device: str) -> Workload:
    """Compare covariances of fewer samples than dimensions: scipy's root of the singular product loses digits."""
    n = 1000 if d == 2048 else d // 2
    pair = partial(two_samples, n, d, device)

    def factors() -> tuple[Tensor, Tensor]:
        return centered(n, d, 1, device), centered(n, d, 2, device)

    implementations = {
        FEATURES: lambda: torch.linalg.svdvals(factors()[0] @ factors()[1].mT).sum(),
        "scipy.linalg.sqrtm": lambda: scipy_trace(*pair()),
        "torch.linalg.eigvals": lambda: eigenvalue_trace(*pair()),
        "torch.linalg.eigh and eigvalsh": lambda: eigh_trace(*pair()),
        "fastgan, features of both kept": lambda: trace_sqrt_product_from_factors(*factors()),
        "fastgan, features of one kept": lambda: trace_sqrt_product_from_factors(factors()[0], cov=pair()[1]),
        **fastgan_methods(pair, ["auto", "pivoted", "eigh", "svd"] if device == "cpu" else ["auto", "eigh", "svd"]),
    }
    return workload("rank_deficient", d, n, 1, device, implementations, FEATURES)


def many_candidates(count: int, d: int, device: str) -> Workload:
    """One reference against several candidates: the reference is factored once, or its root is saved."""

    @functools.cache
    def operands() -> tuple[Tensor, Tensor]:
        candidates = [covariance(SAMPLES[d], d, seed, device) for seed in range(2, 2 + count)]
        return covariance(SAMPLES[d], d, 1, device), torch.stack(candidates)

    def one_by_one(trace: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        reference, candidates = operands()
        return torch.stack([trace(reference, candidate) for candidate in candidates])

    def from_root() -> Tensor:
        return trace_sqrt_product_from_factors(saved_root(SAMPLES[d], d, device), cov=operands()[1])

    one = "torch.linalg.eigh and eigvalsh, one by one"
    implementations = {
        one: lambda: one_by_one(eigh_trace),
        "fastgan auto, one by one": lambda: one_by_one(trace_sqrt_product),
        "fastgan, root of the reference saved": from_root,
        **fastgan_methods(operands, ["auto", "polar"] if device == "cuda" else ["auto"]),
    }
    if d < 2048:
        implementations["torch.linalg.eigvals"] = lambda: eigenvalue_trace(*operands())
    return workload(f"one_against_{count}", d, SAMPLES[d], count, device, implementations, one)


def many_classes(classes: int, d: int, device: str) -> Workload:
    """Classes with few samples each, against one reference of full rank."""

    @functools.cache
    def factors() -> Tensor:
        one = features(CLASS_SAMPLES, d, 2, device)
        x = one * torch.linspace(0.5, 2, classes, dtype=one.dtype, device=one.device)[:, None, None]
        return (x - x.mean(1, keepdim=True)) / (CLASS_SAMPLES - 1) ** 0.5

    def reference() -> Tensor:
        return covariance(SAMPLES[d], d, 1, device)

    def class_by_class() -> Tensor:
        lower = torch.linalg.cholesky(reference())
        return torch.stack([torch.linalg.svdvals(factor @ lower).sum() for factor in factors()])

    def from_root() -> Tensor:
        return trace_sqrt_product_from_factors(factors(), saved_root(SAMPLES[d], d, device))

    one = "singular values, class by class"
    implementations = {
        one: class_by_class,
        "fastgan lowrank": lambda: trace_sqrt_product_from_factors(factors(), cov=reference()),
        "fastgan lowrank, root of the reference saved": from_root,
    }
    return workload(f"{classes}_classes", d, CLASS_SAMPLES, classes, device, implementations, one)


def many_pairs(pairs: int, d: int, device: str) -> Workload:
    """Pairs of small matrices; as one batch or one by one, whichever ``auto`` finds better at this size."""

    @functools.cache
    def operands() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(d)
        x, y = (torch.randn(pairs, 2 * d, d, generator=generator, dtype=torch.float64) for _ in range(2))
        return (x.mT @ x).to(device), (y.mT @ y).to(device)

    def one_by_one() -> Tensor:
        return torch.stack([trace_sqrt_product(a, b) for a, b in zip(*operands(), strict=True)])

    small = d <= 64 and backend_status()[f"extension {device}"].available
    implementations = {
        FACTORS: lambda: factor_trace(*operands()),
        "torch.linalg.eigvals": lambda: eigenvalue_trace(*operands()),
        "torch.linalg.cholesky and eigvalsh, one batch": lambda: cholesky_trace(*operands()),
        "fastgan auto, one by one": one_by_one,
        **fastgan_methods(operands, ["auto", "cholesky", "eigh", "polar", *(["jacobi"] if small else [])]),
    }
    return workload(f"{pairs}_pairs", d, 2 * d, pairs, device, implementations, FACTORS)


def full_root(d: int, device: str) -> Workload:
    def operand() -> Tensor:
        return covariance(SAMPLES[d], d, 1, device)

    def own_root(method: str) -> Tensor:
        return sqrtm(operand(), method=method)

    reference = "torch.linalg.eigh"
    implementations: dict[str, Callable[[], Any]] = {
        reference: lambda: eigenvector_root(operand()),
        "scipy.linalg.sqrtm": lambda: scipy_root(operand()),
        "newton-schulz, eager torch": lambda: newton_schulz_root(operand()),
        **{f"fastgan {method}": partial(own_root, method) for method in ("auto", "eigh", "newton_schulz")},
    }
    if hasattr(torch.linalg, "matrix_sqrth"):  # since torch 2.14
        implementations["torch.linalg.matrix_sqrth"] = lambda: torch.linalg.matrix_sqrth(operand())
    return Workload(
        name=f"sqrtm-{d}",
        implementations=implementations,
        reference=reference,
        check=relative_norm,
        parameters=parameters(d, SAMPLES[d], 1, device),
        once_above=ONCE_ABOVE,
        warmup=0,
    )


def workload(
    name: str,
    d: int,
    n: int,
    candidates: int,
    device: str,
    implementations: dict[str, Callable[[], Any]],
    reference: str,
) -> Workload:
    return Workload(
        name=f"trace_sqrt_product-{name}-{d}",
        implementations=implementations,
        reference=reference,
        check=relative_difference,
        parameters=parameters(d, n, candidates, device),
        once_above=ONCE_ABOVE,
        warmup=0,
    )


def two_samples(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    return covariance(n, d, 1, device), covariance(n, d, 2, device)


def features(n: int, d: int, seed: int, device: str, population: int = 0, smallest: float = 1e-3) -> Tensor:
    """(n, d) float64, drawn with the seed from a population with its own directions.

    Standard deviations along these go from 1 to ``smallest``, evenly in their logarithms.
    """
    samples = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    deviations = torch.logspace(0, math.log10(smallest), d, dtype=torch.float64)
    return (samples @ (deviations[:, None] * directions(d, population))).to(device)


@functools.lru_cache(maxsize=2)
def directions(d: int, population: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + population)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


@functools.lru_cache(maxsize=4)
def centered(n: int, d: int, seed: int, device: str) -> Tensor:
    """Features over sqrt(n - 1) without their mean: F with F^T F their covariance."""
    x = features(n, d, seed, device)
    return (x - x.mean(0)) / (n - 1) ** 0.5


@functools.lru_cache(maxsize=8)
def covariance(n: int, d: int, seed: int, device: str, population: int = 0, smallest: float = 1e-3) -> Tensor:
    return torch.cov(features(n, d, seed, device, population, smallest).T)


@functools.lru_cache(maxsize=1)
def saved_root(n: int, d: int, device: str) -> Tensor:
    """Return the factor of a covariance as a file of statistics holds it."""
    return torch.linalg.cholesky(covariance(n, d, 1, device)).mT.contiguous()


def fastgan_methods(operands: Callable[[], tuple[Tensor, Tensor]], methods: list[str]) -> dict[str, Callable[[], Any]]:
    def run(method: str) -> Tensor:
        return trace_sqrt_product(*operands(), method=method)

    return {f"fastgan {method}": partial(run, method) for method in methods}


def single(*matrices: Tensor) -> tuple[Tensor, ...]:
    return tuple(matrix.float() for matrix in matrices)


def factor_trace(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.svdvals(torch.linalg.cholesky(a).mT @ torch.linalg.cholesky(b)).sum(-1)


def scipy_root(a: Tensor) -> Tensor:
    import scipy.linalg

    return torch.from_numpy(scipy.linalg.sqrtm(a.cpu().numpy()).real)


def scipy_trace(a: Tensor, b: Tensor) -> Tensor:
    return scipy_root(a @ b).trace()


def eigenvector_root(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def eigenvalue_trace(a: Tensor, b: Tensor) -> Tensor:
    """Compute the trace from eigenvalues of the product, as torchmetrics does."""
    return torch.linalg.eigvals(a @ b).sqrt().real.sum(-1)


def eigh_trace(a: Tensor, b: Tensor) -> Tensor:
    root = eigenvector_root(a)
    return torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum(-1)


def cholesky_trace(a: Tensor, b: Tensor) -> Tensor:
    lower = torch.linalg.cholesky(a)
    return torch.linalg.eigvalsh(lower.mT @ b @ lower).clamp(min=0).sqrt().sum(-1)


def newton_schulz_root(a: Tensor, iterations: int = 30) -> Tensor:
    """The iteration that often replaces an eigensolver, with enough steps for these covariances."""
    scale = a.norm()
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    y, z = a / scale, eye
    for _ in range(iterations):
        t = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return y * scale.sqrt()


def newton_schulz_trace(a: Tensor, b: Tensor) -> Tensor:
    return newton_schulz_root(a @ b).trace()


def parameters(d: int, n: int, candidates: int, device: str) -> dict[str, Any]:
    return {"d": d, "n": n, "candidates": candidates, "dtype": "float64", "device": device}
