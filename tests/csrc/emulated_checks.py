"""Compare the CUDA half's operators, emulated on a CPU, with float64 references: ``emulated_checks.py LIBRARY``.

Runs by itself under a sanitizer; prints a line per check, and ends with status 1 if one failed.
"""

import argparse
import math
import sys
from collections.abc import Iterator

import torch

from fastgan.linalg import nuclear_norm

Check = tuple[str, float, float]
"""The name of a comparison, its relative error, and the largest one allowed."""


def covariance(n: int, d: int, rank: int | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return n matrices (d, d), of full rank from twice as many samples unless ``rank`` is given."""
    samples = 2 * d if rank is None else rank
    x = torch.randn(n, d, samples, dtype=torch.float64)
    return (x @ x.mT / max(samples, 1)).to(dtype)


def eigen_root(matrices: torch.Tensor) -> torch.Tensor:
    """Return F with F F^T the given matrices, from their eigenvalues above rounding."""
    values, vectors = torch.linalg.eigh(matrices.double())
    floor = values.shape[-1] * 1e-14 * values[..., -1:]
    return vectors * torch.where(values > floor, values, 0.0).sqrt()[..., None, :]


def trace_of_root(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return tr((A B)^{1/2}) by singular values."""
    return torch.linalg.svdvals(eigen_root(a).mT @ eigen_root(b)).sum(-1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error: absolute for a zero, infinite for values that are not finite."""
    size = torch.where(expected == 0, 1.0, expected.abs())
    worst = ((found - expected).abs() / size).max().item()
    return worst if math.isfinite(worst) else math.inf


def check_small_trace(d: int) -> Iterator[Check]:
    if d > 64:
        return
    pairs = torch.tensor([[0, 1], [1, 1], [1, 0]])
    cases = {"full": covariance(2, d), "singular": covariance(2, d, max(d // 2, 1)), "zero": torch.zeros(2, d, d)}
    cases |= {"float32": covariance(2, d, dtype=torch.float32)}
    for name, a in cases.items():
        a = a.to(torch.float32 if name == "float32" else torch.float64)
        b = covariance(2, d, dtype=a.dtype)
        rows = EMULATED.small_trace(a, b, pairs)
        expected = trace_of_root(a[pairs[:, 0]], b[pairs[:, 1]])
        yield f"small_trace {name}", error(rows[:, 0], expected), 1e-10 if name == "singular" else 1e-12
        yield f"small_trace {name}: found", float((rows[:, 2] <= 0).any()), 0
    a = covariance(2, d)
    rows = EMULATED.small_trace(a.mT, a, torch.tensor([[1, 0]]))
    yield "small_trace transposed", error(rows[:, 0], trace_of_root(a[1:], a[:1])), 1e-12
    a[0, d - 1, d - 1] = -1
    rows = EMULATED.small_trace(a, covariance(1, d), torch.zeros(1, 2, dtype=torch.int64))
    yield "small_trace indefinite: refused", float(rows[0, 2] > 0 or not rows[0, 0].isnan()), 0


def check_nuclear_norm(d: int) -> Iterator[Check]:
    for columns in sorted({d, d + 3, 2 * d}):
        m = torch.randn(3, d, columns, dtype=torch.float64)
        m /= m.abs().amax()
        m[1] = 0
        m[2] = 1e-6 * m[2, :, :1] @ m[2, :1]  # of rank 1
        expected = torch.linalg.svdvals(m).sum(-1)
        for low_precision in (False, True):
            u, report = EMULATED.nuclear_norm(m, low_precision, 1e-5 if low_precision else 1e-10)
            name = f"nuclear_norm from {'tf32' if low_precision else 'float64'}"
            yield name, error(report[:, 0], expected), 1e-9 if low_precision else 1e-12
            yield f"{name}: |U|", (torch.linalg.matrix_norm(u, 2) - 1).max().item(), 1e-12
        same = nuclear_norm(m, method="polar", impl="reference", return_info=True)[1].iterations
        yield (
            "nuclear_norm: steps of the reference",
            (EMULATED.nuclear_norm(m, False, 1e-10)[1][:, 2] - same).abs().max().item(),
            0,
        )


def check_sqrtm(d: int) -> Iterator[Check]:
    a = covariance(2, d, 3 * d)
    a /= a.abs().amax()
    values, vectors = torch.linalg.eigh(a)
    for inverse in (False, True):
        root = EMULATED.sqrtm(a, inverse)
        expected = (vectors * (values.rsqrt() if inverse else values.sqrt())[:, None, :]) @ vectors.mT
        yield f"sqrtm{' of the inverse' * inverse}", ((root - expected).norm() / expected.norm()).item(), 1e-12


CHECKS = {
    "small_trace": check_small_trace,
    "nuclear_norm": check_nuclear_norm,
    "sqrtm": check_sqrtm,
}


def main() -> int:
    global EMULATED
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--dims", default="1,2,3,7,32,33")
    parser.add_argument("--operators", default="all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.ops.load_library(arguments.library)
    EMULATED = torch.ops.fastgan_emulated
    failures = 0
    for name in CHECKS if arguments.operators == "all" else arguments.operators.split(","):
        for d in map(int, arguments.dims.split(",")):
            torch.manual_seed(d)
            for what, found, allowed in CHECKS[name](d):
                right = found <= allowed
                failures += not right
                print(f"{'ok' if right else 'WRONG'} d={d} {what}: {found:.1e}, allowed {allowed:.1e}", flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
