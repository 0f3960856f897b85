"""Matrix functions of covariances: batched, differentiable, and right to the last digits also for singular ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from fastgan.checks import check_alike, check_tensor
from fastgan.ops.trace_sqrt_product import IMPLS, asymmetry, resolve
from fastgan.ops.trace_sqrt_product import trace_sqrt_product as trace_sqrt_product_op
from fastgan.reference.trace_sqrt_product import CHOLESKY, EIGH, FAILED, INDEFINITE, METHODS, SVD

DTYPES = (torch.float32, torch.float64)
ASYMMETRIC = 1e-5
"""A difference between A and its transpose above this share of the largest entry is no rounding error."""

_METHOD_NAMES = {CHOLESKY: "cholesky", EIGH: "eigh", SVD: "svd"}


@dataclass(frozen=True)
class TraceSqrtInfo:
    """How :func:`trace_sqrt_product` found its values.

    Attributes:
        method: the costliest of ``methods``.
        methods: ``"cholesky"``, ``"eigh"`` or ``"svd"`` for each pair of the flattened batch.
        error_bound: float64, shape of the value: a bound on what rounding in the eigensolver changes, in the value's
            units.
        implementation: ``"extension"`` or ``"reference"``.
    """

    method: str
    methods: tuple[str, ...]
    error_bound: Tensor
    implementation: str


@overload
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, method: str = ..., impl: str = ..., return_info: Literal[False] = ...
) -> Tensor: ...
@overload
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, method: str = ..., impl: str = ..., return_info: Literal[True]
) -> tuple[Tensor, TraceSqrtInfo]: ...
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, method: str = "auto", impl: str = "auto", return_info: bool = False
) -> Tensor | tuple[Tensor, TraceSqrtInfo]:
    """tr((A B)^{1/2}) for symmetric positive semi-definite A and B, the cross term of the Frechet distance.

    It is the sum of the singular values of F^T H, where A = F F^T and B = H H^T (Dowson & Landau, "The Frechet distance
    between multivariate normal distributions", 1982). Computed in float64 also for float32 operands: a square root of
    an eigenvalue at rounding level keeps half the digits only. The entries are taken as exact; eigenvalues below zero,
    and in a singular matrix those up to d * 2.2e-16 of the largest, as zero. So a singular covariance that was rounded
    to float32 brings a relative error of about 1e-4 for each missing direction along: keep covariances in float64.

    Args:
        a, b: shape (..., d, d), float32 or float64, same dtype and device. Batch dimensions broadcast; of one reference
            against K candidates, the reference is factored once.
        method: ``"cholesky"`` takes the eigenvalues of L^T B L, with A = L L^T the Cholesky factor of the operand that
            has fewer matrices, which must be positive definite. ``"eigh"`` factors by eigenvectors and needs no such
            thing. ``"svd"`` factors both and takes singular values: slow, accurate for any spectrum. ``"auto"`` is the
            first of these whose error bound is below 3e-10 of the value (1e-7 for float32); ``"eigh"`` goes on to
            ``"svd"`` likewise.
        impl: ``"extension"`` (C++/CUDA), ``"reference"`` (plain PyTorch, same algorithm), or ``"auto"``: the first
            available.
        return_info: return also a :class:`TraceSqrtInfo`.

    Returns:
        The value, of the broadcast batch shape and the operands' dtype, differentiable twice in both operands. The
        gradients are symmetric. In directions that a singular operand lacks, where the derivative is infinite, they are
        zero.

    Raises:
        ValueError: an operand is not square, not finite, clearly asymmetric or indefinite (by 1e-5 of its largest entry
            or eigenvalue), of another dtype, or does not fit the other; ``method="cholesky"`` meets a singular matrix.
    """
    _check_shapes(a, b)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    traced = torch.compiler.is_compiling()  # checks of values would break the graph
    if not traced:
        impl = resolve(impl, a.device)
        _check_values("a", a)
        _check_values("b", b)
    value, report = trace_sqrt_product_op(a, b, method, impl)
    if not traced and bool((report[..., 1] == FAILED).any()):
        raise ValueError(_failure(a, b, method))
    if not return_info:
        return value
    return value, _info(report, impl)


def _check_shapes(a: Tensor, b: Tensor) -> None:
    for name, operand in (("a", a), ("b", b)):
        check_tensor(name, operand, dtypes=DTYPES)
        if operand.ndim < 2 or operand.shape[-1] != operand.shape[-2] or operand.shape[-1] == 0:
            raise ValueError(f"{name} must have shape (..., d, d) with d >= 1, got {tuple(operand.shape)}")
    check_alike(a=a, b=b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"b must have the d of a ({a.shape[-1]}), got {b.shape[-1]}")
    try:
        torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        shapes = f"{tuple(a.shape[:-2])}, got {tuple(b.shape[:-2])}"
        raise ValueError(f"b must have batch dimensions that broadcast with those of a: {shapes}") from None


def _check_values(name: str, operand: Tensor) -> None:
    """Raise unless every matrix is finite and symmetric up to rounding."""
    flat = operand.detach().reshape(-1, *operand.shape[-2:])
    for index, (gap, largest) in enumerate(asymmetry(flat).tolist()):
        where = f"{name}, matrix {index} of the flattened batch," if len(flat) > 1 else name
        if not (gap < float("inf") and largest < float("inf")):
            raise ValueError(f"{where} must be finite, got NaN or infinite entries")
        if gap > ASYMMETRIC * largest:
            share = f"max |A - A^T| is {gap:.3g}, {gap / largest:.2g} of the largest entry (allowed: {ASYMMETRIC:g})"
            raise ValueError(f"{where} must be symmetric: {share}")


def _failure(a: Tensor, b: Tensor, method: str) -> str:
    """Why no value was found; called after the fact only, so its own eigenvalues cost nothing in the good case."""
    for name, operand in (("a", a), ("b", b)):
        values = torch.linalg.eigvalsh(operand.detach().double())
        share = values[..., 0] / values.abs().amax(-1).clamp(min=torch.finfo(torch.float64).tiny)
        if share.min() < -INDEFINITE:
            return (
                f"{name} must be positive semi-definite: its smallest eigenvalue is {share.min().item():.2g} "
                f"of the largest (allowed: {-INDEFINITE:g})"
            )
    if method == "cholesky":
        factored = "b" if b.shape[:-2].numel() < a.shape[:-2].numel() else "a"
        return f"{factored} must be positive definite for method='cholesky', and is singular: use 'auto' or 'eigh'"
    return "a and b must be positive semi-definite"


def _info(report: Tensor, implementation: str) -> TraceSqrtInfo:
    codes = report[..., 1].reshape(-1).long().tolist()
    methods = tuple(_METHOD_NAMES[code] for code in codes)
    return TraceSqrtInfo(_METHOD_NAMES[max(codes, default=CHOLESKY)], methods, report[..., 0], implementation)
