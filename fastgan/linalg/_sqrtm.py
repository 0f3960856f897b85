"""``fastgan::sqrtm`` and ``fastgan::lyapunov``: each is the other's derivative, so that both have every order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from fastgan._dispatch import differentiable
from fastgan.linalg._checks import allowed_spectra, check_spectrum
from fastgan.linalg._dispatch import by_products, callable_anywhere, nan_unless, resolve, watched
from fastgan.linalg._symmetric import power_of_two, scaled, symmetric_part
from fastgan.linalg._transforms import tangent_rule, transform_is_active, untraced

METHODS = ("auto", "eigh", "newton_schulz")
NEWTON_SCHULZ = (1.5, 0.5)
"""The unscaled step, which polishes singular values that are near 1."""

_EPSILON = torch.finfo(torch.float64).eps
_RESIDUAL, _INVERSE_RESIDUAL = 1e-8, 1e-6
"""Above these an iteration has not converged."""


_ROWS = 128  # of the blocks that products of a factor and its transpose are computed by


def compute(a: Tensor, method: str, inverse: bool, impl: str) -> Tensor:
    """A^{1/2}, or A^{-1/2}, of (..., d, d) matrices; computed in float64."""
    flat = a.reshape(-1, *a.shape[-2:])
    if len(flat) == 0:
        return a.clone()
    impl = resolve(impl, a.device)
    scale, flat = scaled(flat, impl)
    if by_eigenvectors(a, method):
        values, vectors = torch.linalg.eigh(flat)
        if not watched():
            check_spectrum("a", values, definite=inverse)
        root = _root_of_eigenpairs(values, vectors, inverse)
        if watched():
            root = nan_unless(allowed_spectra(values, inverse), root)
    else:
        root = _iterated(flat, inverse, impl, fall_back=method == "auto")
    scale = scale[:, None, None].sqrt()
    root = root.div_(scale) if inverse else root.mul_(scale)
    return root.to(a.dtype).reshape(a.shape).contiguous()


sqrtm = custom_op("fastgan::sqrtm", mutates_args=())(compute)


@sqrtm.register_fake
def _(a: Tensor, method: str, inverse: bool, impl: str) -> Tensor:
    return a.new_empty(a.shape)


def by_eigenvectors(a: Tensor, method: str) -> bool:
    """Return whether the roots come from eigenvectors. The eigenvalues then reveal indefinite matrices at no cost."""
    return method == "eigh" or (method == "auto" and not a.is_cuda)


def _root_of_eigenpairs(values: Tensor, vectors: Tensor, inverse: bool) -> Tensor:
    """Eigenvalues up to d * 2.2e-16 of the largest count as zero, also in the inverse. ``vectors`` are overwritten."""
    floor = values.shape[-1] * _EPSILON * values[..., -1:].abs()
    roots = torch.where(values > floor, values.rsqrt() if inverse else values.sqrt(), 0.0)
    return _times_transpose(vectors.mul_(roots.sqrt()[..., None, :]))


def _times_transpose(f: Tensor) -> Tensor:
    """F F^T of (..., d, d), symmetric to the last bit: of both triangles but one is computed, by blocks of rows."""
    out = f.new_empty(f.shape)
    for i in range(0, f.shape[-1], _ROWS):
        end = i + _ROWS
        rows = f[..., i:end, :] @ f[..., :end, :].mT
        out[..., i:end, :i], out[..., :i, i:end] = rows[..., :i], rows[..., :i].mT
        out[..., i:end, i:end] = symmetric_part(rows[..., i:])
    return out


def _iterated(a: Tensor, inverse: bool, impl: str, fall_back: bool) -> Tensor:
    """Compute roots by Newton-Schulz.

    Matrices that do not converge are NaN within a CUDA graph. Elsewhere they are computed by eigenvectors if
    ``fall_back``, and are a RuntimeError otherwise.
    """
    root = torch.ops.fastgan_C.sqrtm(a, inverse) if a.is_cuda and impl == "extension" else newton_schulz(a, inverse)
    target = torch.eye(a.shape[-1]).to(a).expand_as(a) if inverse else a
    difference = (root @ a @ root if inverse else root @ root) - target
    size = torch.linalg.matrix_norm(target)
    residual = torch.linalg.matrix_norm(difference) / torch.where(size > 0, size, 1.0)
    failed = ~(residual <= (_INVERSE_RESIDUAL if inverse else _RESIDUAL))
    if watched():
        return nan_unless(~failed, root)
    if bool(failed.any()):
        if not fall_back:
            share = residual[failed].amax().item()
            raise RuntimeError(f"method='newton_schulz' did not converge (residual {share:.1e}): use 'eigh'")
        values, vectors = torch.linalg.eigh(a[failed])
        root[failed] = _root_of_eigenpairs(values, vectors, inverse)
    return root


def newton_schulz(a: Tensor, inverse: bool) -> Tensor:
    """Roots from matrix products alone: the coupled iteration (Higham, "Functions of Matrices", 2008, 6.7), scaled.

    Y (Z Y)^{-1/2} and (Z Y)^{-1/2} Z stay as they are while Z Y goes to I, so Y ends at A^{1/2} and Z at A^{-1/2}.
    Eigenvalues are resolved down to 1e-10 of |A|_F, for the inverse down to 1e-16. Rounding leaves the zero eigenvalues
    of a singular matrix at about -1e-17, and negative ones grow with every step, so the number of steps is limited.
    csrc/sqrtm.h takes the same steps on a GPU.
    """
    scale = torch.linalg.matrix_norm(a, keepdim=True)
    y = torch.where(scale > 0, a / scale, 0.0)
    z = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    for linear, cubic in scaled_newton_schulz(1e-8 if inverse else 1e-5):
        t = (z @ y).mul_(-cubic)
        t.diagonal(dim1=-2, dim2=-1).add_(linear)
        y, z = y @ t, t @ z
    return symmetric_part(z) / scale.sqrt() if inverse else symmetric_part(y) * scale.sqrt()


def scaled_newton_schulz(smallest: float) -> list[tuple[float, float]]:
    """(linear, cubic) of the steps x <- linear x - cubic x^3 that bring [smallest, 1] within 1e-8 of 1, and one more.

    3 rho / 2 and rho^3 / 2 with rho^2 = 3 / (1 + l + l^2) for values in [l, 1] (Chen & Chow, "A stable scaling of
    Newton-Schulz for improving the sign function computation of a Hermitian matrix", 2014), but at most 2.8: near
    l = 0 the optimum sends 1 almost to 0, and rounding errors would dominate it.
    """
    steps, low = [], smallest
    while 1 - low > 1e-8:
        rho = math.sqrt(min(2.8, 3 / (1 + low + low * low)))
        linear, cubic = 1.5 * rho, 0.5 * rho**3
        steps.append((linear, cubic))
        low = min(linear * low - cubic * low**3, linear - cubic)
    return [*steps, NEWTON_SCHULZ]


@custom_op("fastgan::lyapunov", mutates_args=())
def lyapunov(root: Tensor, rhs: Tensor) -> Tensor:
    """The symmetric X (..., d, d) with root X + X root = the symmetric part of ``rhs``.

    ``rhs`` has the batch dimensions of ``root`` and may have more in front. X is zero between directions that ``root``
    lacks.
    """
    flat_root = root.reshape(-1, *root.shape[-2:]).double()
    if rhs.numel() == 0:
        return rhs.clone()
    flat_rhs = symmetric_part(rhs.double().reshape(-1, *flat_root.shape))
    scale = power_of_two(flat_root)[:, None, None]
    flat_root = flat_root / scale
    if by_products(root):
        x, converged = lyapunov_newton_schulz(flat_root, flat_rhs)
        if watched():
            x = nan_unless(converged, x)
        elif not bool(converged.all()):
            x[:, ~converged] = _lyapunov_eigh(flat_root[~converged], flat_rhs[:, ~converged])
    else:
        x = _lyapunov_eigh(flat_root, flat_rhs)
    return (x / scale).to(rhs.dtype).reshape(rhs.shape).contiguous()


@lyapunov.register_fake
def _(root: Tensor, rhs: Tensor) -> Tensor:
    return rhs.new_empty(rhs.shape)


def _lyapunov_eigh(root: Tensor, rhs: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(root)
    sums = values[..., :, None] + values[..., None, :]
    floor = (values.shape[-1] * _EPSILON) ** 0.5 * values[..., -1].abs()[..., None, None]
    rotated = vectors.mT @ rhs @ vectors
    return symmetric_part(vectors @ torch.where(sums > floor, rotated / sums, 0.0) @ vectors.mT)


def lyapunov_newton_schulz(s: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """X with S X + X S = ``rhs`` for positive definite S, from matrix products alone, and whether that has converged.

    The sign function of [[S, G], [0, -S]] is [[I, 2 X], [0, -I]] (Roberts, "Linear model reduction and solution of the
    algebraic Riccati equation by use of the sign function", 1980), found by scaled Newton-Schulz steps x <- linear x -
    cubic x^3 on the two blocks. Eigenvalues are resolved down to 1e-8 of |S|_F; smaller ones do not converge.
    """
    scale = torch.linalg.matrix_norm(s, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    s, g = symmetric_part(s) / scale, rhs / scale
    for linear, cubic in scaled_newton_schulz(1e-8):
        square = s @ s
        s, g = linear * s - cubic * (square @ s), linear * g - cubic * (square @ g - s @ g @ s + g @ square)
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    return 0.5 * g, torch.linalg.matrix_norm(s - eye) <= 1e-6


def _save_root(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse = inputs[2]
    ctx.save_for_backward(output)
    ctx.save_for_forward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """Solve S dS + dS S = dA, from S S = A; or R dR + dR R = -R^2 dA R^2, from R R = A^{-1}."""
    (root,) = ctx.saved_tensors
    adjoint = _solve_lyapunov(root, grad)
    if ctx.inverse:
        square = root @ root
        adjoint = -square @ adjoint @ square
    return adjoint, None, None, None


def _save_equation(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.save_for_forward(inputs[0], output)


def _lyapunov_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Solve S dX + X dS = dG - dS X - X dS; the map G -> X is its own adjoint."""
    root, x = ctx.saved_tensors
    y = _solve_lyapunov(root, cotangent)
    return -(y @ x + x @ y).sum_to_size(root.shape), y


class _Sqrtm(Function):
    """``fastgan::sqrtm`` for transforms of ``torch.func`` and forward mode."""

    setup_context = staticmethod(_save_root)
    backward = staticmethod(untraced(_backward))

    @staticmethod
    def forward(a: Tensor, method: str, inverse: bool, impl: str) -> Tensor:
        return sqrtm(a, method, inverse, impl)

    @staticmethod
    @tangent_rule
    def jvp(ctx: Any, saved: list[Tensor], tangent: Tensor, *_: Any) -> Tensor:
        (root,) = saved
        if ctx.inverse:
            square = root @ root
            tangent = -square @ tangent @ square
        return _solve_lyapunov(root, tangent)

    @staticmethod
    @untraced
    def vmap(info: Any, in_dims: tuple[Any, ...], a: Tensor, *options: Any) -> tuple[Tensor, int]:
        return _Sqrtm.apply(a.movedim(in_dims[0], 0), *options), 0


class _Lyapunov(Function):
    """``fastgan::lyapunov`` for transforms of ``torch.func`` and forward mode."""

    setup_context = staticmethod(_save_equation)
    backward = staticmethod(untraced(_lyapunov_backward))

    @staticmethod
    def forward(root: Tensor, rhs: Tensor) -> Tensor:
        return lyapunov(root, rhs)

    @staticmethod
    @tangent_rule
    def jvp(ctx: Any, saved: list[Tensor], root_tangent: Tensor | None, rhs_tangent: Tensor | None) -> Tensor:
        root, x = saved
        change = torch.zeros_like(x) if rhs_tangent is None else rhs_tangent
        if root_tangent is not None:
            change = change - root_tangent @ x - x @ root_tangent
        return _solve_lyapunov(root, change)

    @staticmethod
    @untraced
    def vmap(info: Any, in_dims: tuple[int | None, int | None], root: Tensor, rhs: Tensor) -> tuple[Tensor, int]:
        root_dim, rhs_dim = in_dims
        rhs = rhs.expand(info.batch_size, *rhs.shape) if rhs_dim is None else rhs.movedim(rhs_dim, 0)
        if root_dim is None:
            return _Lyapunov.apply(root, rhs), 0
        root = root.movedim(root_dim, 0)
        extra = rhs.ndim - root.ndim  # batch dimensions of rhs alone go in front of the mapped one
        return _Lyapunov.apply(root, rhs.movedim(0, extra)), extra


def _solve_lyapunov(root: Tensor, rhs: Tensor) -> Tensor:
    """Call ``fastgan::lyapunov`` so that the transform that is active, if any, can differentiate it."""
    return _Lyapunov.apply(root, rhs) if transform_is_active() else _lyapunov(root, rhs)


_lyapunov = differentiable(lyapunov, _lyapunov_backward, _save_equation)
call = callable_anywhere(differentiable(sqrtm, _backward, _save_root), untraced(_Sqrtm.apply))
