"""Spectral normalization of a list of weights by the C++ extension, on a CPU: each step is one pass over all weights.

The signatures are those of ``fastgan.reference.spectral_norm``, which handles the cases that the extension does not:
weights that are not contiguous, and vectors of another dtype than the arithmetic's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.backend import load_extension
from fastgan.reference import spectral_norm as reference
from fastgan.reference.spectral_norm import compute_dtype

load_extension()
_update = torch.ops.fastgan_C.spectral_norm_update.default
_scale = torch.ops.fastgan_C.spectral_norm_scale.default
_scale_bwd = torch.ops.fastgan_C.spectral_norm_scale_bwd.default
_scale_bwd_bwd = torch.ops.fastgan_C.spectral_norm_scale_bwd_bwd.default


def update(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Power iterations on all weights, as in the reference."""
    dtype = compute_dtype(weights[0])
    fit = all(x.is_contiguous() and x.dtype == dtype for x in (*us, *vs))
    if not fit or not _are_contiguous(weights):
        return reference.update(weights, us, vs, dims, n_power_iterations, eps, v_first)
    sizes = (sum(u.shape[0] for u in us), sum(v.shape[0] for v in vs), len(weights))
    u, v, sigma = (weights[0].new_empty(size, dtype=dtype) for size in sizes)
    _update(weights, us, vs, dims, n_power_iterations, eps, v_first, u, v, sigma)
    return u, v, sigma


def scale(
    weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """W / sigma for every weight, as ``dtype``."""
    if not _are_contiguous(weights):
        return reference.scale(weights, u, v, sigma, dims, dtype)
    out = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    _scale(weights, u.contiguous(), v.contiguous(), sigma.contiguous(), dims, out)
    return out


def scale_bwd(
    grads: Sequence[Tensor], weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int]
) -> list[Tensor]:
    """dW = G / sigma - (<G, W> / sigma^2) u v^T, for sigma = u^T W v with u and v constant."""
    if not _are_contiguous(weights):
        return reference.scale_bwd(grads, weights, u, v, sigma, dims)
    out = [torch.empty_like(weight) for weight in weights]
    grads = [grad.contiguous() for grad in grads]
    _scale_bwd(grads, weights, u.contiguous(), v.contiguous(), sigma.contiguous(), dims, out)
    return out


def scale_bwd_bwd(
    grad_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:
    """Gradients of <H, scale_bwd(G, W)>: those of every G, then those of every W, as in the reference."""
    if not _are_contiguous(weights):
        return reference.scale_bwd_bwd(grad_grads, grads, weights, u, v, sigma, dims)
    d_grads = [torch.empty_like(weight, dtype=grad.dtype) for weight, grad in zip(weights, grads, strict=True)]
    d_weights = [torch.empty_like(weight) for weight in weights]
    grad_grads, grads = ([x.contiguous() for x in xs] for xs in (grad_grads, grads))
    vectors = u.contiguous(), v.contiguous(), sigma.contiguous()
    _scale_bwd_bwd(grad_grads, grads, weights, *vectors, dims, d_grads, d_weights)
    return d_grads + d_weights


def _are_contiguous(weights: Sequence[Tensor]) -> bool:
    return all(weight.is_contiguous() for weight in weights)
