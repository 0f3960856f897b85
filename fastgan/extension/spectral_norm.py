"""Spectral normalization of a list of weights by the C++ extension, on a CPU: each step is one pass over all weights.

The signatures are those of ``fastgan.reference.spectral_norm``. Weights are read in their order of memory, also
channels-last ones; those with gaps or overlaps are copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.backend import load_extension
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
    given_us, given_vs = us, vs
    if not fit:
        us, vs = ([x.to(dtype).contiguous() for x in xs] for xs in (us, vs))
    sizes = (sum(u.shape[0] for u in us), sum(v.shape[0] for v in vs), len(weights))
    u, v, sigma = (weights[0].new_empty(size, dtype=dtype) for size in sizes)
    _update(weights, us, vs, dims, n_power_iterations, eps, v_first, u, v, sigma)
    if n_power_iterations and not fit:
        torch._foreach_copy_([*given_us, *given_vs], [*us, *vs])
    return u, v, sigma


def scale(
    weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """W / sigma for every weight, as ``dtype``."""
    return _scale(weights, u.contiguous(), v.contiguous(), sigma.contiguous(), dims, dtype)


def scale_bwd(
    grads: Sequence[Tensor], weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int]
) -> list[Tensor]:
    """dW = G / sigma - (<G, W> / sigma^2) u v^T, for sigma = u^T W v with u and v constant."""
    return _scale_bwd(grads, weights, u.contiguous(), v.contiguous(), sigma.contiguous(), dims)


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
    return _scale_bwd_bwd(grad_grads, grads, weights, u.contiguous(), v.contiguous(), sigma.contiguous(), dims)
