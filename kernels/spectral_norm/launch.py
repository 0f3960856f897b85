"""Grouped spectral normalization: each launch covers all weights of a network, found by a table of device pointers.

Launches: 2 a power iteration (s = W v, t = W^T u), 1 to scale, 2 for backward and 2 for double backward, however many
weights there are. Functions have the names, signatures and results of :mod:`fastgan.reference.spectral_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastgan.kernels.launch import launch, on_its_device
from fastgan.kernels.spectral_norm.kernels import (
    spectral_norm_combine_kernel,
    spectral_norm_dots_kernel,
    spectral_norm_matvec_kernel,
    spectral_norm_matvec_t_kernel,
    spectral_norm_scale_kernel,
)
from fastgan.kernels.spectral_norm.plan import TILES, Plan, table_of, walk_of

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TILE = {"BLOCK_R": TILES.block_r, "BLOCK_C": TILES.block_c}
_REDUCE = {"REDUCE_PARTS": TILES.reduce_parts, "REDUCE_BLOCK": TILES.reduce_block}
S_BLOCKS = {**_TILE, **_REDUCE, "CHUNK": TILES.chunk_c}
T_BLOCKS = {**_TILE, **_REDUCE, "CHUNK": TILES.chunk_r}
COMBINE_BLOCKS = {"BLOCK_R": TILES.tile_r, "BLOCK_C": TILES.block_c, "CHUNK": TILES.chunk_tile}
DOTS_BLOCKS = {**COMBINE_BLOCKS, "REDUCE_BLOCK": TILES.reduce_block}


@on_its_device
def update(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Power iterations in 2 launches each, or sigma alone in 1; see :func:`fastgan.reference.spectral_norm.update`."""
    weights, plan = _planned(weights, dims)
    own_us, own_vs = _plain_vectors(us, weights[0].dtype), _plain_vectors(vs, weights[0].dtype)
    sizes = (plan.partials, plan.u_size, plan.v_size, len(weights))
    partials, u, v, sigma = (torch.empty(size, dtype=torch.float32, device=weights[0].device) for size in sizes)
    pointers = table_of(weights, own_us, own_vs).pointers
    dtype = TL_DTYPES[weights[0].dtype]
    args = (partials, u, v, sigma, eps, len(weights))

    def renew_u(from_list: bool) -> None:
        launch(
            spectral_norm_matvec_kernel,
            TILES,
            lambda _: (len(plan.s_tiles),),
            (pointers, plan.geometry, plan.s_tiles, *args),
            FROM_LIST=from_list,
            W_DTYPE=dtype,
            **S_BLOCKS,
        )

    def renew_v(from_list: bool, update: bool = True) -> None:
        launch(
            spectral_norm_matvec_t_kernel,
            TILES,
            lambda _: (len(plan.t_tiles),),
            (pointers, plan.geometry, plan.t_tiles, *args),
            UPDATE=update,
            FROM_LIST=from_list,
            W_DTYPE=dtype,
            **T_BLOCKS,
        )

    if n_power_iterations == 0:
        renew_v(from_list=True, update=False)
        return u, v, sigma
    first, second = (renew_v, renew_u) if v_first else (renew_u, renew_v)
    for i in range(n_power_iterations):
        first(i == 0)
        second(False)
    for own, given in zip((*own_us, *own_vs), (*us, *vs), strict=True):
        if own is not given:
            given.copy_(own)
    return u, v, sigma


@on_its_device
def scale(
    weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """W / sigma in 1 launch; see :func:`fastgan.reference.spectral_norm.scale`."""
    given, (weights, plan) = weights, _planned(weights, dims)
    out = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    table = table_of(weights, out)
    launch(
        spectral_norm_scale_kernel,
        TILES,
        lambda _: (len(plan.flat_tiles),),
        (table.pointers, plan.geometry, plan.flat_tiles, sigma, len(weights)),
        W_DTYPE=TL_DTYPES[weights[0].dtype],
        O_DTYPE=TL_DTYPES[dtype],
        ALIGNMENT=16 if table.aligned else 1,
        BLOCK=TILES.block_flat,
    )
    return _restored(out, weights, given)


@on_its_device
def scale_bwd(
    grads: Sequence[Tensor], weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int]
) -> list[Tensor]:
    """dW in 2 launches; see :func:`fastgan.reference.spectral_norm.scale_bwd`."""
    given, (weights, plan) = weights, _planned(weights, dims)
    grads = _laid_out_as(weights, grads, grads[0].dtype)
    d_weights = [torch.empty_like(weight) for weight in weights]
    _launch_gradients(plan, (weights, grads, d_weights), u, v, sigma)
    return _restored(d_weights, weights, given)


@on_its_device
def scale_bwd_bwd(
    grad_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:
    """Gradients of all G, then all W, in 2 launches; see :func:`fastgan.reference.spectral_norm.scale_bwd_bwd`."""
    given, (weights, plan) = weights, _planned(weights, dims)
    grads = _laid_out_as(weights, grads, grads[0].dtype)
    grad_grads = _laid_out_as(weights, grad_grads, weights[0].dtype)
    d_weights = [torch.empty_like(weight) for weight in weights]
    d_grads = [torch.empty_like(grad) for grad in grads]
    _launch_gradients(plan, (weights, grads, grad_grads, d_weights, d_grads), u, v, sigma)
    return _restored(d_grads, weights, given) + _restored(d_weights, weights, given)


def _launch_gradients(plan: Plan, lists: tuple[Sequence[Tensor], ...], u: Tensor, v: Tensor, sigma: Tensor) -> None:
    weights, grads, *_ = lists
    n, n_tiles, double = len(weights), len(plan.tiles), len(lists) == 5
    partials, dots = sigma.new_empty((3 if double else 1) * n_tiles), sigma.new_empty((3 if double else 1) * n)
    tables = (table_of(*lists).pointers, plan.geometry, plan.tiles)
    flags = {"DOUBLE": double, "W_DTYPE": TL_DTYPES[weights[0].dtype], "G_DTYPE": TL_DTYPES[grads[0].dtype]}
    summed = (*tables, partials, dots, u, v, n, n_tiles)
    launch(spectral_norm_dots_kernel, TILES, lambda _: (n_tiles,), summed, **flags, **DOTS_BLOCKS)
    combined = (*tables, dots, u, v, sigma, n)
    launch(spectral_norm_combine_kernel, TILES, lambda _: (n_tiles,), combined, **flags, **COMBINE_BLOCKS)


def _planned(weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[Sequence[Tensor], Plan]:
    """Weights that the kernels can walk (copies of those that have gaps or too many levels), and their tables."""
    forms = tuple([(weight.shape, weight.stride()) for weight in weights])
    copied, plan = walk_of(forms, tuple(dims), weights[0].device)
    if not copied:
        return weights, plan
    return [weight.contiguous() if i in copied else weight for i, weight in enumerate(weights)], plan


def _plain_vectors(vectors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return each vector, or a copy if it is not contiguous or not of ``dtype``."""
    return [v if v.dtype == dtype and v.is_contiguous() else v.to(dtype).contiguous() for v in vectors]


def _laid_out_as(weights: Sequence[Tensor], tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return each tensor, or a copy if it is not of ``dtype`` or not laid out as its weight."""
    return [
        tensor
        if tensor.dtype == dtype and (tensor.stride() == weight.stride() or _strides(tensor) == _strides(weight))
        else torch.empty_like(weight, dtype=dtype).copy_(tensor)
        for tensor, weight in zip(tensors, weights, strict=True)
    ]


def _restored(results: list[Tensor], walked: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Return the results in the layout of the given weights, copied if the kernel walked a copy of the weight."""
    return [
        result if weight is original else torch.empty_like(original, dtype=result.dtype).copy_(result)
        for result, weight, original in zip(results, walked, given, strict=True)
    ]


def _strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
