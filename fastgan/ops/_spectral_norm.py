"""Spectral normalization of all weights of a network at once: power iteration, and W / sigma, differentiable twice.

``spectral_norm_update`` updates u and v in place and returns copies of them, flat, with sigma = u^T W v;
``spectral_norm_scale`` is the differentiable part, whose gradients regard u and v as constants and sigma as a function
of W. Keeping the copies for backward lets two forwards of one network be differentiated together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan._checks import check_tensor
from fastgan._dispatch import (
    autocast_dtype,
    differentiable,
    is_exporting,
    is_transforming,
    no_autocast,
    outside_autocast,
    runs_at_once,
)
from fastgan.backend import check_impl, implementation, resolve
from fastgan.reference import spectral_norm as reference
from fastgan.reference.spectral_norm import compute_dtype, matrix_shape, scale_differentiably


def spectral_norm_update(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int] | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    impl: str = "auto",
    v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``n_power_iterations`` of the power method on every weight; ``us`` and ``vs`` are updated in place.

    Args:
        weights: tensors of rank 2 or more, of one dtype (float64 not by Triton, float32, bfloat16, float16) and
            device, any strides. Each is read as a matrix of ``weight.shape[dim]`` rows and the rest as columns.
        us: left vectors, one of ``rows`` entries for each weight.
        vs: right vectors, one of ``columns`` entries for each weight.
        dims: the dimension of each weight that gives its rows; 0 for all if None.
        n_power_iterations: 0 only computes sigma for the given vectors.
        eps: lower bound of the norms that are divided by.
        impl: "auto", "triton", "extension" or "reference".
        v_first: an iteration is v = W^T u / |W^T u|, then u = W v / |W v|, as in torch's older hook, Miyato's and
            BigGAN's code; otherwise u is renewed before v, as in torch's parametrization.

    Returns:
        ``(u, v, sigma)`` in float32 (float64 for float64 weights): all left vectors concatenated, all right
        vectors, and per weight sigma = u^T W v, or 1 if that is 0. None has a gradient. A vector stays as it was if
        its product with W is zero or not finite.

    Raises:
        ValueError: a list has the wrong length, or a tensor the wrong rank, shape, dtype or device.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", arXiv 1802.05957.

    Example:
        >>> weights = [torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 0.5]))]
        >>> first = [torch.tensor([1.0, 0.0])] * 2
        >>> u, v, sigma = spectral_norm_update(weights, first, first)
        >>> sigma
        tensor([3., 2.])
    """
    dims, impl = _check_weights(weights, dims, impl)
    _check_vectors("us", us, weights, [matrix_shape(w, d)[0] for w, d in zip(weights, dims, strict=True)])
    _check_vectors("vs", vs, weights, [matrix_shape(w, d)[1] for w, d in zip(weights, dims, strict=True)])
    if n_power_iterations < 0:
        raise ValueError(f"n_power_iterations must be 0 or more, got {n_power_iterations}")
    return update_vectors(weights, us, vs, dims, n_power_iterations, eps, impl, v_first)


def update_vectors(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    impl: str,
    v_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`spectral_norm_update` of operands that fit one another by ``impl``, which is resolved.

    No entry of ``dims`` is negative.
    """
    with torch.no_grad():
        if is_exporting() or (is_transforming() and not n_power_iterations):  # vmap has no rule for ops
            with no_autocast(weights[0]):
                return reference.update(weights, us, vs, dims, n_power_iterations, float(eps), v_first)
        weights = [weight.detach() for weight in weights] if is_transforming() else weights
        if runs_at_once(*weights, *us, *vs):
            update = implementation("spectral_norm", impl).update
            vectors = update(weights, us, vs, dims, n_power_iterations, float(eps), v_first)
            if n_power_iterations:
                torch.autograd.graph.increment_version([*us, *vs])
            return vectors
        if n_power_iterations == 0:
            return spectral_norm_sigma_op(list(weights), list(us), list(vs), list(dims), impl)
        return spectral_norm_update_op(
            list(weights), list(us), list(vs), list(dims), n_power_iterations, float(eps), impl, v_first
        )


def spectral_norm_scale(
    weights: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    dims: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """W / sigma for every weight.

    Args:
        weights: as in :func:`spectral_norm_update`.
        u, v, sigma: what :func:`spectral_norm_update` returned for these weights.
        dims: as in :func:`spectral_norm_update`.
        dtype: of the results; if None, the autocast dtype if autocast is active, else that of the weights.
        impl: "auto", "triton", "extension" or "reference".

    Returns:
        One tensor a weight, in its shape and layout. Differentiable twice with respect to the weights, with u and v
        constant: dW = G / sigma - (<G, W> / sigma^2) u v^T.

    Raises:
        ValueError: a list has the wrong length, or a tensor the wrong rank, shape, dtype or device.

    Example:
        >>> weights = [torch.diag(torch.tensor([3.0, 1.0]))]
        >>> state = spectral_norm_update(weights, [torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 0.0])])
        >>> spectral_norm_scale(weights, *state)
        [tensor([[1.0000, 0.0000],
                [0.0000, 0.3333]])]
    """
    dims, impl = _check_weights(weights, dims, impl)
    shapes = [matrix_shape(w, d) for w, d in zip(weights, dims, strict=True)]
    sizes = {"u": sum(r for r, _ in shapes), "v": sum(c for _, c in shapes), "sigma": len(weights)}
    for (name, size), tensor in zip(sizes.items(), (u, v, sigma), strict=True):
        check_tensor(name, tensor, ndim=1, dtypes=(compute_dtype(weights[0]),))
        if tensor.shape[0] != size or tensor.device != weights[0].device:
            raise ValueError(
                f"{name} must have {size} entries on {weights[0].device} for these weights, "
                f"got {tensor.shape[0]} on {tensor.device}"
            )
    return scaled(weights, u, v, sigma, dims, dtype or output_dtype(weights[0]), impl)


def scaled(
    weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int], dtype: torch.dtype, impl: str
) -> list[Tensor]:
    """Compute :func:`spectral_norm_scale` as :func:`update_vectors` does :func:`spectral_norm_update`."""
    if is_exporting() or is_transforming():
        with no_autocast(weights[0]):
            return scale_differentiably(weights, u, v, dims, dtype)
    if not torch.is_grad_enabled() and runs_at_once(*weights):
        return implementation("spectral_norm", impl).scale(weights, u, v, sigma, dims, dtype)
    return cast(list[Tensor], _scale(list(weights), u, v, sigma, list(dims), dtype, impl))


def output_dtype(weight: Tensor) -> torch.dtype:
    """The autocast dtype if autocast is active and applies to ``weight``, else the dtype of ``weight``."""
    return autocast_dtype(weight) or weight.dtype


def _check_weights(weights: Sequence[Tensor], dims: Sequence[int] | None, impl: str) -> tuple[list[int], str]:
    """Raise unless ``weights`` and ``dims`` can be used; return ``dims``, none negative, and ``impl``, resolved."""
    check_impl(impl)
    if len(weights) == 0:
        raise ValueError("weights must hold at least one tensor, got an empty list")
    if dims is None:
        dims = [0] * len(weights)
    if len(dims) != len(weights):
        raise ValueError(f"dims must have one entry for each of the {len(weights)} weights, got {len(dims)}")
    first = weights[0]
    for i, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
        check_tensor(f"weights[{i}]", weight)
        if weight.ndim < 2 or 0 in weight.shape:
            raise ValueError(
                f"weights[{i}] must have 2 or more dimensions, none of size 0, got shape {tuple(weight.shape)}"
            )
        if weight.dtype != first.dtype or weight.device != first.device:
            raise ValueError(
                f"weights[{i}] must have the dtype and device of weights[0] ({first.dtype}, {first.device}), "
                f"got {weight.dtype}, {weight.device}"
            )
        if not -weight.ndim <= dim < weight.ndim:
            raise ValueError(f"dims[{i}] must lie in [{-weight.ndim}, {weight.ndim - 1}], got {dim}")
    return [dim % weight.ndim for dim, weight in zip(dims, weights, strict=True)], resolve(impl, first)


def _check_vectors(name: str, vectors: Sequence[Tensor], weights: Sequence[Tensor], sizes: list[int]) -> None:
    if len(vectors) != len(weights):
        raise ValueError(f"{name} must have one vector for each of the {len(weights)} weights, got {len(vectors)}")
    for i, (vector, size) in enumerate(zip(vectors, sizes, strict=True)):
        check_tensor(f"{name}[{i}]", vector, ndim=1)
        if vector.shape[0] != size or vector.device != weights[0].device:
            raise ValueError(
                f"{name}[{i}] must have {size} entries on {weights[0].device}, got {vector.shape[0]} on {vector.device}"
            )


@custom_op("fastgan::spectral_norm_update", mutates_args=("us", "vs"))
@outside_autocast
def spectral_norm_update_op(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    impl: str,
    v_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    update = implementation("spectral_norm", impl).update
    return update(weights, us, vs, dims, n_power_iterations, eps, v_first)


@custom_op("fastgan::spectral_norm_sigma", mutates_args=())
@outside_autocast
def spectral_norm_sigma_op(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("spectral_norm", impl).update(weights, us, vs, dims, 0, 0.0)


@spectral_norm_update_op.register_fake
@spectral_norm_sigma_op.register_fake
def _(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(weights[0])
    sizes = (sum(u.shape[0] for u in us), sum(v.shape[0] for v in vs), len(weights))
    u, v, sigma = (weights[0].new_empty(size, dtype=dtype) for size in sizes)
    return u, v, sigma


@custom_op("fastgan::spectral_norm_scale", mutates_args=())
@outside_autocast
def spectral_norm_scale_op(
    weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int], dtype: torch.dtype, impl: str
) -> list[Tensor]:
    return implementation("spectral_norm", impl).scale(weights, u, v, sigma, dims, dtype)


@spectral_norm_scale_op.register_fake
def _(
    weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int], dtype: torch.dtype, impl: str
) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=dtype) for weight in weights]


@custom_op("fastgan::spectral_norm_scale_bwd", mutates_args=())
@outside_autocast
def spectral_norm_scale_bwd_op(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    dims: Sequence[int],
    impl: str,
) -> list[Tensor]:
    return implementation("spectral_norm", impl).scale_bwd(grads, weights, u, v, sigma, dims)


@spectral_norm_scale_bwd_op.register_fake
def _(grads: Sequence[Tensor], weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


@custom_op("fastgan::spectral_norm_scale_bwd_bwd", mutates_args=())
@outside_autocast
def spectral_norm_scale_bwd_bwd_op(
    grad_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    dims: Sequence[int],
    impl: str,
) -> list[Tensor]:
    scale_bwd_bwd = implementation("spectral_norm", impl).scale_bwd_bwd
    return scale_bwd_bwd(grad_grads, grads, weights, u, v, sigma, dims)


@spectral_norm_scale_bwd_bwd_op.register_fake
def _(grad_grads: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    d_grads = [torch.empty_like(weight, dtype=grad.dtype) for weight, grad in zip(weights, grads, strict=True)]
    return d_grads + [torch.empty_like(weight) for weight in weights]


def _save_scale(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, u, v, sigma, ctx.dims, ctx.dtype, ctx.impl = inputs
    ctx.save_for_backward(*weights, u, v, sigma)


def _scale_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *weights, u, v, sigma = ctx.saved_tensors
    filled = _filled(grads, weights, ctx.dtype)
    d_weights = _scale_bwd(filled, weights, u, v, sigma, ctx.dims, ctx.impl)
    return d_weights, None, None, None, None, None, None


def _save_scale_bwd(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grads, weights, u, v, sigma, ctx.dims, ctx.impl = inputs
    ctx.n = len(weights)
    ctx.save_for_backward(*grads, *weights, u, v, sigma)


def _scale_bwd_backward(ctx: Any, grad_grads: list[Tensor | None]) -> tuple[Any, ...]:
    *tensors, u, v, sigma = ctx.saved_tensors
    grads, weights = tensors[: ctx.n], tensors[ctx.n :]
    filled = _filled(grad_grads, weights, weights[0].dtype)
    out = _scale_bwd_bwd(filled, grads, weights, u, v, sigma, ctx.dims, ctx.impl)
    return out[: ctx.n], out[ctx.n :], None, None, None, None, None


def _third_order(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise RuntimeError("spectral_norm_scale has gradients to second order")


def _filled(grads: list[Tensor | None], like: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zeros for outputs that the differentiated result does not depend on."""
    return [torch.zeros_like(w, dtype=dtype) if g is None else g for g, w in zip(grads, like, strict=True)]


_scale = differentiable(spectral_norm_scale_op, _scale_backward, _save_scale)
_scale_bwd_bwd = differentiable(spectral_norm_scale_bwd_bwd_op, _third_order)
_scale_bwd = differentiable(spectral_norm_scale_bwd_op, _scale_bwd_backward, _save_scale_bwd)
