"""``fastgan::nuclear_norm``: schema, dispatch (C++/CUDA extension, or plain PyTorch) and autograd to second order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan import backend
from fastgan._checks import dispatched_if_needed
from fastgan.linalg import _nuclear_norm_reference as reference
from fastgan.linalg._nuclear_norm_reference import GRAM, POLAR, SVD, power_of_two

IMPLS = ("auto", "extension", "reference")
LOWER, UPPER, METHOD, ITERATIONS = range(4)
"""Columns of a report."""

_SMALL, _LARGE = 2.0**-100, 2.0**100
"""Between them the fourth power of an entry, the largest that anything here takes, stays in float64's range."""


def resolve(impl: str, device: torch.device) -> str:
    """Turn ``impl`` into ``"extension"`` or ``"reference"`` for operands on ``device``.

    Raises:
        ValueError: ``impl`` is ``"extension"`` where that half of it is missing.
    """
    supported = device.type in ("cpu", "cuda")
    if impl == "reference" or (impl == "auto" and not supported):
        return "reference"
    if supported and backend.extension_available(device.type):
        return "extension"
    if impl == "extension":
        reason = backend.extension_missing(device.type) if supported else f"it has no half for {device.type} tensors"
        raise ValueError(f"impl='extension' cannot be used: {reason}")
    return "reference"


def value_tolerance(dtype: torch.dtype) -> float:
    """The share of the value that an error bound may have before a slower method takes over."""
    return 1e-7 if dtype == torch.float32 else 1e-9


def polar_factor(m: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    """Polar factors and (value, error estimate, iterations) of float64 ``m`` (n, rows <= cols, cols) about 1 in size.

    ``dtype`` is that of the operands behind ``m``: for float32 ones, float32 iterations come first.
    """
    low = dtype == torch.float32
    polar = torch.ops.fastgan_C.nuclear_norm if resolve(impl, m.device) == "extension" else reference.polar_factor
    return polar(m, low, 1e-5 if low else 1e-10)


def polar_rows(m: Tensor, dtype: torch.dtype, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """Values (n,) and reports (n, 4) of such ``m``, by the polar iteration."""
    u, found = polar_factor(m, dtype, impl)
    value = found[:, 0]
    lower, upper = reference.polar_bounds(m, u) if bounds else (torch.zeros_like(value), value + float("inf"))
    return value, torch.stack([lower, upper, torch.full_like(value, POLAR), found[:, 2]], 1)


def direct_rows(value: Tensor, bound: Tensor, method: int) -> Tensor:
    """Reports (n, 4) of a method without iterations."""
    return torch.stack([(value - bound).clamp(min=0), value + bound, torch.full_like(value, method), 0 * value], 1)


def compute(m: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    """||M||_* of (..., rows, cols) matrices, and float64 (lower bound, upper bound, method code, iterations)."""
    flat = m.reshape(-1, *m.shape[-2:])
    flat = (flat if m.shape[-2] <= m.shape[-1] else flat.mT).double()
    scale = power_of_two(flat)
    if m.is_cuda or bool(((scale < _SMALL) | (scale > _LARGE)).any()):  # a whole pass over memory, on a CPU
        flat = flat / scale[:, None, None]
    else:
        scale = torch.ones_like(scale)
    value, report = _solve(flat, m.dtype, method, impl, bounds)
    report[:, :METHOD] *= scale[:, None]
    return (value * scale).to(m.dtype, copy=True).reshape(m.shape[:-2]), report.reshape(*m.shape[:-2], 4)


nuclear_norm = custom_op("fastgan::nuclear_norm", mutates_args=())(compute)
call = dispatched_if_needed(compute, nuclear_norm)


def _solve(m: Tensor, dtype: torch.dtype, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    if len(m) == 0:
        return m.new_zeros(0), m.new_zeros(0, 4)
    if method == "polar" or (method == "auto" and m.is_cuda):
        return polar_rows(m, dtype, impl, bounds)
    if method == "svd":
        value, bound = reference.nuclear_norm_svd(m)
        return value, direct_rows(value, bound, SVD)
    value, bound, accurate = reference.nuclear_norm_gram(m, value_tolerance(dtype))
    report = direct_rows(value, bound, GRAM)
    poor = ~accurate
    if method == "auto" and bool(poor.any()):
        value[poor], bound = reference.nuclear_norm_svd(m[poor])
        report[poor] = direct_rows(value[poor], bound, SVD)
    return value, report


@nuclear_norm.register_fake
def _(m: Tensor, method: str, impl: str, bounds: bool) -> tuple[Tensor, Tensor]:
    return m.new_empty(m.shape[:-2]), m.new_empty((*m.shape[:-2], 4), dtype=torch.float64)


@custom_op("fastgan::nuclear_norm_bwd", mutates_args=())
def nuclear_norm_bwd(grad: Tensor, m: Tensor) -> Tensor:
    flat = _flat(m)
    weight = grad.double().reshape(-1)
    u = resolved_polar_factor(flat) if by_products(m) else None
    return _as(m, reference.nuclear_norm_bwd(weight, flat) if u is None else weight[:, None, None] * u)


@nuclear_norm_bwd.register_fake
def _(grad: Tensor, m: Tensor) -> Tensor:
    return m.new_empty(m.shape)


@custom_op("fastgan::nuclear_norm_bwd_bwd", mutates_args=())
def nuclear_norm_bwd_bwd(cotangent: Tensor, grad: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    grad_grad, grad_m = _second(_flat(cotangent), grad.double().reshape(-1), _flat(m), by_products(m))
    return grad_grad.to(grad.dtype).reshape(grad.shape), _as(m, grad_m)


@nuclear_norm_bwd_bwd.register_fake
def _(cotangent: Tensor, grad: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), m.new_empty(m.shape)


def _second(cotangent: Tensor, grad: Tensor, m: Tensor, products: bool) -> tuple[Tensor, Tensor]:
    u = resolved_polar_factor(m) if products else None
    if u is None:
        return reference.nuclear_norm_bwd_bwd(cotangent, grad, m)
    tall = m.shape[-2] > m.shape[-1]
    wide = [matrix.mT if tall else matrix for matrix in (cotangent, m, u)]
    grad_grad, grad_m, converged = reference.bwd_bwd_by_products(wide[0], grad, wide[1], wide[2])
    if not captured(m) and not bool(converged.all()):
        return reference.nuclear_norm_bwd_bwd(cotangent, grad, m)
    return grad_grad, grad_m.mT if tall else grad_m


def by_products(operand: Tensor) -> bool:
    """Whether gradients avoid eigenvectors: where these are slow."""
    return operand.is_cuda


def captured(operand: Tensor) -> bool:
    """Whether this is within a CUDA graph, where nobody may look at values."""
    return operand.is_cuda and torch.cuda.is_current_stream_capturing()


def resolved_polar_factor(m: Tensor) -> Tensor | None:
    """Polar factors of float64 ``m`` (n, rows, cols), or None where one lacks a direction.

    Iterated to the end: a gradient is of first order in the error of the polar factor, where the value is of second.
    """
    if len(m) == 0:
        return m
    wide = m if m.shape[-2] <= m.shape[-1] else m.mT
    wide = wide / power_of_two(wide)[:, None, None]
    extension = resolve("auto", m.device) == "extension"
    polar = torch.ops.fastgan_C.nuclear_norm if extension else reference.polar_factor
    u, _ = polar(wide.contiguous(), False, 0.0)
    if not captured(m) and not bool(reference.has_orthonormal_rows(u).all()):
        return None
    return u if m.shape[-2] <= m.shape[-1] else u.mT


def _flat(m: Tensor) -> Tensor:
    return m.reshape(-1, *m.shape[-2:]).double()


def _as(m: Tensor, flat: Tensor) -> Tensor:
    return flat.to(m.dtype).reshape(m.shape).contiguous()


def _save_operand(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    return nuclear_norm_bwd(grad, *ctx.saved_tensors), None, None, None


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    return nuclear_norm_bwd_bwd(cotangent, *ctx.saved_tensors)


nuclear_norm.register_autograd(_backward, setup_context=_save_operand)
nuclear_norm_bwd.register_autograd(_backward_backward, setup_context=_save_inputs)
