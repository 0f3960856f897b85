"""``fastgan::trace_sqrt_product``: schema, dispatch (C++ extension, or plain PyTorch) and autograd to second order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan import backend
from fastgan._checks import dispatched_if_needed
from fastgan.linalg import _trace_gradients as gradients
from fastgan.linalg import _trace_reference as reference
from fastgan.linalg._nuclear_norm import (
    IMPLS,
    LOWER,
    METHOD,
    UPPER,
    by_products,
    captured,
    direct_rows,
    polar_rows,
    resolve,
    resolved_polar_factor,
    value_tolerance,
)
from fastgan.linalg._nuclear_norm_reference import root_sum
from fastgan.linalg._trace_reference import CHOLESKY, DIRECT, FAILED, JACOBI, POLAR

__all__ = ["IMPLS", "METHODS", "asymmetry", "resolve", "trace_sqrt_product"]

METHODS = ("auto", "cholesky", "pivoted", "eigh", "svd", "polar", "jacobi")
JACOBI_SIZE = 64
"""Largest d of the kernel that takes a pair of matrices a block: three of them stand in its shared memory."""

BATCH_SIZE, BATCH_PAIRS = 128, 4
"""On a CPU, at least this many pairs of matrices of up to this size are worked on as a batch: a call for each costs
more than the arithmetic."""

_CHUNK_ENTRIES = 2**26  # of the products that a chunk of pairs is iterated on


def compute(a: Tensor, b: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """tr((A B)^{1/2}) of (..., d, d) matrices, and float64 (lower bound, upper bound, method code, iterations)."""
    shape = batch_shape(a, b)
    matrices_a, matrices_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    if method == "auto" and a.is_cuda:
        small = a.shape[-1] <= JACOBI_SIZE and resolve(impl, a.device) == "extension"
        method = "jacobi" if small else "polar"
    # made where they are used: within a CUDA graph nothing may be copied to the device
    device = a.device if method in ("polar", "jacobi") else torch.device("cpu")
    pairs = torch.stack([_indices(a, shape, device), _indices(b, shape, device)], 1)
    if len(matrices_b) < len(matrices_a):  # the first operand is factored: let that be the one with fewer matrices
        matrices_a, matrices_b, pairs = matrices_b, matrices_a, pairs.flip(1)
    value, report = _solve(matrices_a, matrices_b, pairs.contiguous(), method, impl, bounds)
    return value.to(a.dtype, copy=True).reshape(shape), report.reshape(*shape, 4)


trace_sqrt_product = custom_op("fastgan::trace_sqrt_product", mutates_args=())(compute)
call = dispatched_if_needed(compute, trace_sqrt_product)


def _solve(a: Tensor, b: Tensor, pairs: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """Values (n,) and reports (n, 4) for pairs of matrices of a and b, (., d, d)."""
    extension = resolve(impl, a.device) == "extension"
    if len(pairs) == 0:
        return a.new_zeros(0, dtype=torch.float64), a.new_zeros(0, 4, dtype=torch.float64)
    if method == "polar":
        return _polar(a, b, pairs, impl, bounds)
    if method == "jacobi":
        rows = torch.ops.fastgan_C.small_trace(a, b, pairs)
        rows[:, 2] = torch.where(rows[:, 2] > 0, float(JACOBI), float(FAILED))
    else:
        direct = torch.ops.fastgan_C.trace_sqrt_product if extension else reference.trace_sqrt_product
        if method == "auto" and a.shape[-1] <= BATCH_SIZE and len(pairs) >= BATCH_PAIRS:
            rows = _batched(a, b, pairs, direct)
        else:
            rows = direct(a, b, pairs, DIRECT[method]).to(a.device)
    report = direct_rows(rows[:, 0], rows[:, 1], 0)
    report[:, METHOD] = rows[:, 2]
    return rows[:, 0], report


def _batched(a: Tensor, b: Tensor, pairs: Tensor, direct: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Tensor:
    """The rows of ``direct``, from Cholesky factors of all of ``a`` at once; ``direct`` does what they cannot."""
    (scale_a, wide_a), (scale_b, wide_b) = scaled(a), scaled(b)
    lower, singular = reference.cholesky_if_definite(wide_a)
    i, j = pairs.unbind(1)
    factor = _taken(lower, i)
    eigenvalues = torch.linalg.eigvalsh(factor.mT @ _taken(wide_b, j) @ factor)
    value, bound, accurate = root_sum(eigenvalues, value_tolerance(a.dtype))
    scale = scale_a[i].sqrt() * scale_b[j].sqrt()
    rows = torch.stack([value * scale, bound * scale, torch.full_like(value, CHOLESKY)], 1)
    rest = singular[i] | ~accurate
    if bool(rest.any()):
        rows[rest] = direct(a, b, pairs[rest].contiguous(), DIRECT["auto"])
    return rows


def _taken(matrices: Tensor, index: Tensor) -> Tensor:
    """``matrices[index]``, without a copy where that is all of them in their order."""
    every = torch.arange(len(matrices), device=index.device)
    return matrices if torch.equal(index, every) else matrices[index]


def _polar(a: Tensor, b: Tensor, pairs: Tensor, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """||F^T H||_* of factors A = F F^T, B = H H^T, each taken once."""
    scale_a, factor_a, bad_a = _factored(a)
    scale_b, factor_b, bad_b = _factored(b)
    noise_a, noise_b = (reference.factor_noise(factor) if bounds else None for factor in (factor_a, factor_b))
    step = max(1, _CHUNK_ENTRIES // a.shape[-1] ** 2)
    values, reports = [], []
    for i, j in (chunk.unbind(1) for chunk in pairs.split(step)):
        value, report = polar_rows(factor_a[i].mT @ factor_b[j], a.dtype, impl, bounds)
        if noise_a is not None and noise_b is not None:
            error = reference.factor_errors(value, noise_a[i], noise_b[j])
            report[:, LOWER], report[:, UPPER] = (report[:, LOWER] - error).clamp(min=0), report[:, UPPER] + error
        scale = scale_a[i].sqrt() * scale_b[j].sqrt()
        report[:, :METHOD] *= scale[:, None]
        bad = bad_a[i] | bad_b[j]
        report[:, METHOD] = torch.where(bad, float(FAILED), float(POLAR))
        values.append(torch.where(bad, float("nan"), value * scale))
        reports.append(report)
    return torch.cat(values), torch.cat(reports)


def _factored(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, wide = scaled(matrices)
    return scale, *reference.factors(wide)


def scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two, and the symmetric float64 matrices divided by them."""
    if not matrices.is_cuda and backend.extension_available("cpu"):
        return torch.ops.fastgan_C.scaled(matrices)
    return reference.scaled(matrices)


def batch_shape(a: Tensor, b: Tensor) -> torch.Size:
    """Of the values. Raises RuntimeError where the batch dimensions do not broadcast."""
    left, right = a.shape[:-2], b.shape[:-2]
    if left == right:  # the first call of torch.broadcast_shapes imports sympy for a second
        return left
    return torch.broadcast_shapes(left, right)


def _indices(operand: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """For each pair of the broadcast batch, which matrix of ``operand`` it holds."""
    batch = operand.shape[:-2]
    return torch.arange(batch.numel(), device=device).reshape(batch).expand(shape).reshape(-1)


@trace_sqrt_product.register_fake
def _(a: Tensor, b: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    shape = batch_shape(a, b)
    return a.new_empty(shape), a.new_empty((*shape, 4), dtype=torch.float64)


def _transport(a: Tensor, b: Tensor) -> gradients.Transport | None:
    """None where gradients are by eigenvectors, or an operand is singular."""
    return gradients.transport_by_products(a, b, resolved_polar_factor, captured(a)) if by_products(a) else None


@custom_op("fastgan::trace_sqrt_product_bwd", mutates_args=())
def trace_sqrt_product_bwd(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    found = _transport(a, b)
    if found is not None:
        return gradients.bwd_by_products(grad, a, b, found)
    return gradients.trace_sqrt_product_bwd(grad, a, b)


@trace_sqrt_product_bwd.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


@custom_op("fastgan::trace_sqrt_product_bwd_bwd", mutates_args=())
def trace_sqrt_product_bwd_bwd(
    cotangent_a: Tensor, cotangent_b: Tensor, grad: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found = _transport(a, b)
    if found is not None:
        second = gradients.bwd_bwd_by_products(cotangent_a, cotangent_b, grad, a, b, found, captured(a))
        if second is not None:
            return second
    return gradients.trace_sqrt_product_bwd_bwd(cotangent_a, cotangent_b, grad, a, b)


@trace_sqrt_product_bwd_bwd.register_fake
def _(cotangent_a: Tensor, cotangent_b: Tensor, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(grad.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return *trace_sqrt_product_bwd(grad, *ctx.saved_tensors), None, None, None


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward_backward(ctx: Any, cotangent_a: Tensor, cotangent_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return trace_sqrt_product_bwd_bwd(cotangent_a, cotangent_b, *ctx.saved_tensors)


trace_sqrt_product.register_autograd(_backward, setup_context=_save_operands)
trace_sqrt_product_bwd.register_autograd(_backward_backward, setup_context=_save_inputs)


def asymmetry(matrices: Tensor) -> Tensor:
    """Largest magnitudes of A - A^T and of A for ``matrices`` (n, d, d), as (n, 2); not finite where A is not."""
    if not matrices.is_cuda and backend.extension_available("cpu"):
        return torch.ops.fastgan_C.asymmetry(matrices)
    return reference.asymmetry(matrices)
