"""``fastgan::sqrtm`` and ``fastgan::lyapunov``, each other's derivatives: differentiable as often as one likes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan._checks import dispatched_if_needed
from fastgan.linalg import _sqrtm_reference as reference
from fastgan.linalg._nuclear_norm import by_products, captured, resolve
from fastgan.linalg._nuclear_norm_reference import lyapunov_newton_schulz, power_of_two

METHODS = ("auto", "eigh", "newton_schulz")

_RESIDUAL, _INVERSE_RESIDUAL = 1e-8, 1e-6
"""Above these an iteration has not converged."""


def compute(a: Tensor, method: str, inverse: bool, impl: str) -> Tensor:
    """A^{1/2}, or A^{-1/2}, of (..., d, d) matrices; computed in float64."""
    flat = a.reshape(-1, *a.shape[-2:]).double()
    if len(flat) == 0:
        return a.clone()
    scale = power_of_two(flat)[:, None, None]
    flat = reference.symmetric_part(flat) / scale
    if method == "eigh" or (method == "auto" and not a.is_cuda):
        root = reference.sqrtm_eigh(flat, inverse)
    else:
        root = _iterated(flat, inverse, impl, fall_back=method == "auto")
    root = root / scale.sqrt() if inverse else root * scale.sqrt()
    return root.to(a.dtype).reshape(a.shape).contiguous()


sqrtm = custom_op("fastgan::sqrtm", mutates_args=())(compute)
call = dispatched_if_needed(compute, sqrtm)


def _iterated(a: Tensor, inverse: bool, impl: str, fall_back: bool) -> Tensor:
    """By Newton-Schulz; where that has not converged by eigenvectors, or a RuntimeError."""
    iterate = torch.ops.fastgan_C.sqrtm if resolve(impl, a.device) == "extension" else reference.sqrtm_newton_schulz
    root = iterate(a, inverse)
    if captured(a):
        return root
    residual = reference.residual(a, root, inverse)
    failed = ~(residual <= (_INVERSE_RESIDUAL if inverse else _RESIDUAL))
    if bool(failed.any()):
        if not fall_back:
            share = residual[failed].amax().item()
            raise RuntimeError(f"method='newton_schulz' did not converge (residual {share:.1e}): use 'eigh'")
        root[failed] = reference.sqrtm_eigh(a[failed], inverse)
    return root


@sqrtm.register_fake
def _(a: Tensor, method: str, inverse: bool, impl: str) -> Tensor:
    return a.new_empty(a.shape)


@custom_op("fastgan::lyapunov", mutates_args=())
def lyapunov(root: Tensor, rhs: Tensor) -> Tensor:
    """The symmetric X (..., d, d) with root X + X root = the symmetric part of ``rhs``."""
    flat_root, flat_rhs = (m.reshape(-1, *m.shape[-2:]).double() for m in (root, rhs))
    if len(flat_root) == 0:
        return rhs.clone()
    scale = power_of_two(flat_root)[:, None, None]
    solve = _lyapunov_iterated if by_products(root) else reference.lyapunov
    return (solve(flat_root / scale, flat_rhs) / scale).to(rhs.dtype).reshape(rhs.shape).contiguous()


def _lyapunov_iterated(root: Tensor, rhs: Tensor) -> Tensor:
    """By Newton-Schulz, as eigensolvers are slow on a GPU; where that has not converged by eigenvectors."""
    x, converged = lyapunov_newton_schulz(root, reference.symmetric_part(rhs))
    if captured(root):
        return x
    failed = ~converged
    if bool(failed.any()):
        x[failed] = reference.lyapunov(root[failed], rhs[failed])
    return x


@lyapunov.register_fake
def _(root: Tensor, rhs: Tensor) -> Tensor:
    return rhs.new_empty(rhs.shape)


def _save_root(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse = inputs[2]
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """From S S = A: S dS + dS S = dA. From R R = A^{-1}: R dR + dR R = -R^2 dA R^2."""
    (root,) = ctx.saved_tensors
    adjoint = lyapunov(root, grad)
    if ctx.inverse:
        square = root @ root
        adjoint = -square @ adjoint @ square
    return adjoint, None, None, None


def _save_equation(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _lyapunov_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """S dX + dX S = dG - dS X - X dS, and the map G -> X is its own adjoint."""
    root, x = ctx.saved_tensors
    y = lyapunov(root, cotangent)
    return -(y @ x + x @ y), y


sqrtm.register_autograd(_backward, setup_context=_save_root)
lyapunov.register_autograd(_lyapunov_backward, setup_context=_save_equation)
