"""Matrix square roots: fastgan against scipy's Schur method, torch's eigensolvers and plain Newton-Schulz."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Workload
from fastgan import _extension
from fastgan.linalg import sqrtm, trace_sqrt_product

QUICK_SIZE = 128
SIZES = (256, 768, 2048)
SAMPLES = {128: 640, 256: 1280, 768: 3840, 2048: 10000}
CANDIDATES = 8
CLASS_SAMPLES = 50
SLOW_ON_A_CPU = 768
"""Above this size a CPU takes minutes for the methods that are made of matrix products."""


def workloads(quick: bool, device: str) -> list[Workload]:
    sizes = (QUICK_SIZE,) if quick else SIZES
    largest = sizes[-1]
    return [
        *(make(d, device) for d in sizes for make in (full_rank, rank_deficient)),
        many_candidates(sizes[-2] if len(sizes) > 1 else largest, device),
        many_classes(50 if quick else 1000, largest, device),
        many_small(100 if quick else 1000, device),
        full_root(QUICK_SIZE if quick else 768, device),
    ]


def full_rank(d: int, device: str) -> Workload:
    n = SAMPLES[d]
    a, b = (torch.cov(features(n, d, seed, device).T) for seed in (1, 2))
    methods = ["auto", "cholesky", "eigh"]
    if device == "cuda" or d <= SLOW_ON_A_CPU:
        methods += ["svd", "polar"]
    implementations = {
        "scipy.linalg.sqrtm": partial(scipy_trace, a, b),
        "torch.linalg.eigvals": partial(eigenvalue_trace, a, b),
        **fastgan_methods(a, b, methods),
    }
    if "polar" in methods:
        implementations["newton-schulz, eager torch"] = partial(newton_schulz_trace, a, b)
        implementations["fastgan polar, float32"] = partial(trace_sqrt_product, a.float(), b.float(), method="polar")
    return workload("full_rank", d, n, 1, device, implementations, "scipy.linalg.sqrtm")


def rank_deficient(d: int, device: str) -> Workload:
    """The reference takes singular values of the features: scipy's square root of a singular product is off by 5e-5."""
    n = 1000 if d == 2048 else d // 2
    x, y = (features(n, d, seed, device) for seed in (1, 2))
    a, b = torch.cov(x.T), torch.cov(y.T)
    factors = tuple((f - f.mean(0)) / (n - 1) ** 0.5 for f in (x, y))
    implementations = {
        "singular values of features": partial(feature_trace, x, y),
        "scipy.linalg.sqrtm": partial(scipy_trace, a, b),
        "torch.linalg.eigvals": partial(eigenvalue_trace, a, b),
        "fastgan lowrank": partial(trace_sqrt_product, None, None, factors=factors),
        "fastgan lowrank, one factor": partial(trace_sqrt_product, None, b, factors=(factors[0], None)),
        **fastgan_methods(a, b, ["auto"]),
    }
    return workload("rank_deficient", d, n, 1, device, implementations, "singular values of features")


def many_candidates(d: int, device: str) -> Workload:
    """One reference against several candidates: the reference is factored once."""
    n = SAMPLES[d]
    reference = torch.cov(features(n, d, 1, device).T)
    candidates = torch.stack([torch.cov(features(n, d, seed, device).T) for seed in range(2, 2 + CANDIDATES)])
    implementations = {
        "torch.linalg.eigvals": partial(eigenvalue_trace, reference, candidates),
        "fastgan auto, one by one": lambda: torch.stack([trace_sqrt_product(reference, c) for c in candidates]),
        **fastgan_methods(reference, candidates, ["auto", "polar"] if device == "cuda" else ["auto"]),
    }
    return workload(f"one_against_{CANDIDATES}", d, n, CANDIDATES, device, implementations, "torch.linalg.eigvals")


def many_classes(classes: int, d: int, device: str) -> Workload:
    """Classes of a few samples, each against one reference of full rank."""
    cov = torch.cov(features(SAMPLES[d], d, 1, device).T)
    x = torch.stack([features(CLASS_SAMPLES, d, 2, device, mixed=False)] * classes)
    x = x * torch.linspace(0.5, 2, classes, dtype=x.dtype, device=x.device)[:, None, None]
    factors = (x - x.mean(1, keepdim=True)) / (CLASS_SAMPLES - 1) ** 0.5

    def class_by_class() -> Tensor:
        lower = torch.linalg.cholesky(cov)
        return torch.stack([torch.linalg.svdvals(factor @ lower).sum() for factor in factors])

    implementations = {
        "singular values, class by class": class_by_class,
        "fastgan lowrank": partial(trace_sqrt_product, None, cov, factors=(factors, None)),
    }
    reference = "singular values, class by class"
    return workload(f"{classes}_classes", d, CLASS_SAMPLES, classes, device, implementations, reference)


def many_small(pairs: int, device: str, d: int = 32) -> Workload:
    x, y = (torch.stack([features(2 * d, d, seed + 2 * i, device) for i in range(pairs)]) for seed in (1, 2))
    a, b = x.mT @ x, y.mT @ y
    jacobi = not _extension._missing(device)
    implementations = {
        "torch.linalg.eigvals": partial(eigenvalue_trace, a, b),
        **fastgan_methods(a, b, ["auto", "polar", *(["jacobi"] if jacobi else [])]),
    }
    return workload(f"{pairs}_pairs", d, 2 * d, pairs, device, implementations, "torch.linalg.eigvals")


def full_root(d: int, device: str) -> Workload:
    a = torch.cov(features(SAMPLES[d], d, 1, device).T)
    implementations = {
        "scipy.linalg.sqrtm": partial(scipy_root, a),
        "torch.linalg.eigh": partial(eigenvector_root, a),
        **{f"fastgan {method}": partial(sqrtm, a, method=method) for method in ("auto", "newton_schulz")},
    }
    return Workload(
        name=f"sqrtm-{d}",
        implementations=implementations,
        reference="scipy.linalg.sqrtm",
        check=lambda root, truth: ((root.cpu() - truth.cpu()).norm() / truth.cpu().norm()).item(),
        parameters=parameters(d, SAMPLES[d], 1, device),
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
        check=relative_error,
        parameters=parameters(d, n, candidates, device),
    )


def features(n: int, d: int, seed: int, device: str, mixed: bool = True) -> Tensor:
    """(n, d) float64 with standard deviations from 1 to 1e-2, mixed by an orthogonal matrix of its own."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d).double()
    if mixed:
        samples = samples @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return samples.to(device)


def fastgan_methods(a: Tensor, b: Tensor, methods: list[str]) -> dict[str, Callable[[], Any]]:
    return {f"fastgan {method}": partial(trace_sqrt_product, a, b, method=method) for method in methods}


def scipy_root(a: Tensor) -> Tensor:
    import scipy.linalg

    return torch.from_numpy(scipy.linalg.sqrtm(a.cpu().numpy()).real)


def scipy_trace(a: Tensor, b: Tensor) -> Tensor:
    return scipy_root(a @ b).trace()


def eigenvector_root(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def eigenvalue_trace(a: Tensor, b: Tensor) -> Tensor:
    """What torchmetrics does."""
    return torch.linalg.eigvals(a @ b).sqrt().real.sum(-1)


def newton_schulz_trace(a: Tensor, b: Tensor, iterations: int = 30) -> Tensor:
    """The iteration on A B that is often used in place of an eigensolver."""
    product = a @ b
    scale = product.norm()
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    y, z = product / scale, eye
    for _ in range(iterations):
        t = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return y.trace() * scale.sqrt()


def feature_trace(x: Tensor, y: Tensor) -> Tensor:
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    return torch.linalg.svdvals(centred_x @ centred_y.T).sum() / ((len(x) - 1) * (len(y) - 1)) ** 0.5


def relative_error(result: Tensor, reference: Tensor) -> float:
    return ((result.cpu().double() - reference.cpu()).abs() / reference.cpu()).max().item()


def parameters(d: int, n: int, candidates: int, device: str) -> dict[str, Any]:
    return {"d": d, "n": n, "candidates": candidates, "dtype": "float64", "device": device}
