"""Spectral normalization of a list of weights in plain PyTorch.

Each weight is read as a matrix W: its dimension ``dim`` gives the rows, the others, flattened, the columns. The vectors
of all weights lie one behind the other in two flat tensors, u (the rows of all) and v (the columns of all).
Arithmetic is float64 for float64 weights and float32 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._dispatch import is_exporting


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which norms, vectors and sigma are computed: float64 for float64 weights, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def matrix_shape(weight: Tensor, dim: int) -> tuple[int, int]:
    """Rows and columns of ``weight`` read as a matrix with the rows along ``dim``."""
    return weight.shape[dim], math.prod(weight.shape[:dim]) * math.prod(weight.shape[dim + 1 :])


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """``weight`` as a (rows, columns) matrix; a view if its strides allow one."""
    return weight.movedim(dim, 0).flatten(1)


def split_vectors(u: Tensor, v: Tensor, weights: Sequence[Tensor], dims: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The (u, v) of each weight, as views of the flat vectors."""
    shapes = [matrix_shape(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
    rows, columns = zip(*shapes, strict=True)
    return list(zip(u.split(rows), v.split(columns), strict=True))


def update(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Power iterations on all weights; writes ``us`` and ``vs`` and returns flat copies of them and sigma = u^T W v.

    An iteration updates u from v and then v from u, or with ``v_first`` v from u and then u from v. With
    ``n_power_iterations=0`` nothing is written and sigma belongs to the given vectors. If a product is zero or not
    finite, its vector is undefined and the old one stays. If sigma is zero, 1 is returned, so a weight of zeros stays
    zero.
    """
    new_us, new_vs, sigmas = [], [], []
    for weight, u, v, dim in zip(weights, us, vs, dims, strict=True):  # one by one, as a core's cache may hold a weight
        matrix = as_matrix(weight, dim).to(compute_dtype(weight))
        u, v = u.to(matrix.dtype), v.to(matrix.dtype)
        if v_first:  # the same iteration on the transposed matrix
            v, u, sigma = _iterate(matrix.T, v, u, n_power_iterations, eps)
        else:
            u, v, sigma = _iterate(matrix, u, v, n_power_iterations, eps)
        new_us.append(u)
        new_vs.append(v)
        sigmas.append(sigma)
    if n_power_iterations and is_exporting():  # the tracer does not see copies of lists
        for old, new in zip([*us, *vs], [*new_us, *new_vs], strict=True):
            old.copy_(new)
    elif n_power_iterations:
        torch._foreach_copy_([*us, *vs], [*new_us, *new_vs])
    sigma = torch.stack(sigmas)
    return torch.cat(new_us), torch.cat(new_vs), torch.where(sigma == 0, torch.ones_like(sigma), sigma)


def _iterate(w: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    for _ in range(n_power_iterations):
        u = _normalized(torch.mv(w, v), u, eps)
        product = torch.mv(w.T, u)
        v = _normalized(product, v, eps)
    if n_power_iterations == 0:
        product = torch.mv(w.T, u)
    # u^T W v = (W^T u) . v, so the product W v that torch computes here is not needed.
    return u, v, torch.dot(product, v)


def _normalized(product: Tensor, old: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(product)
    if is_exporting():
        return torch.where((length > 0) & (length < math.inf), product / length.clamp_min(eps), old)
    norm = length.item()
    return product / max(norm, eps) if 0 < norm < math.inf else old


def scale(
    weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """W / sigma for every weight, as ``dtype``."""
    del u, v, dims  # part of the op, for its gradients
    return [
        torch.div(_widen(weight), s, out=torch.empty_like(weight, dtype=dtype))
        for weight, s in zip(weights, sigma.unbind(), strict=True)
    ]


def scale_differentiably(
    weights: Sequence[Tensor], u: Tensor, v: Tensor, dims: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """:func:`scale` with PyTorch's own operators and gradients, for graphs that are exported and for transforms of
    ``torch.func``, which do not know the gradients of ops."""
    results = []
    for weight, (row, column), dim in zip(weights, split_vectors(u, v, weights, dims), dims, strict=True):
        w = _widen(weight)
        sigma = torch.dot(row, torch.mv(as_matrix(w, dim), column))
        results.append((w / torch.where(sigma == 0, torch.ones_like(sigma), sigma)).to(dtype))
    return results


def scale_bwd(
    grads: Sequence[Tensor], weights: Sequence[Tensor], u: Tensor, v: Tensor, sigma: Tensor, dims: Sequence[int]
) -> list[Tensor]:
    """dW = G / sigma - (<G, W> / sigma^2) u v^T, for sigma = u^T W v with u and v constant."""
    out = []
    for grad, weight, (row, column), s, dim in zip(
        grads, weights, split_vectors(u, v, weights, dims), sigma.unbind(), dims, strict=True
    ):
        g, w = _widen(grad, weight), _widen(weight)
        d_weight = torch.div(g, s, out=torch.empty_like(weight, dtype=s.dtype))
        out.append(_add_outer(d_weight, -_dot(g, w) / s / s, row, column, dim).to(weight.dtype))
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
    """Gradients of <H, scale_bwd(G, W)>: those of every G, then those of every W.

    With uv = u v^T: dG = H / sigma - (<H, uv> / sigma^2) W and
    dW = (2 <G, W> <H, uv> / sigma^3 - <H, G> / sigma^2) uv - (<H, uv> / sigma^2) G.
    """
    d_grads, d_weights = [], []
    for grad_grad, grad, weight, (row, column), s, dim in zip(
        grad_grads, grads, weights, split_vectors(u, v, weights, dims), sigma.unbind(), dims, strict=True
    ):
        h, g, w = _widen(grad_grad, weight), _widen(grad, weight), _widen(weight)
        h_uv = torch.dot(row, torch.mv(as_matrix(h, dim), column))
        d_grad = torch.div(h, s, out=torch.empty_like(weight, dtype=s.dtype))
        d_grads.append(d_grad.addcmul_(w, -h_uv / s / s).to(grad.dtype))
        d_weight = torch.mul(g, -h_uv / s / s, out=torch.empty_like(weight, dtype=s.dtype))
        factor = (2 * (_dot(g, w) / s) * h_uv - _dot(h, g)) / s / s
        d_weights.append(_add_outer(d_weight, factor, row, column, dim).to(weight.dtype))
    return d_grads + d_weights


def _widen(x: Tensor, like: Tensor | None = None) -> Tensor:
    return x.to(compute_dtype(x if like is None else like))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> over all entries, without a temporary if both have the same layout."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _add_outer(x: Tensor, factor: Tensor, row: Tensor, column: Tensor, dim: int) -> Tensor:
    """Add ``factor * row column^T`` to ``x`` in place."""
    if dim == 0 and x.is_contiguous():
        x.view(x.shape[0], -1).addr_(factor * row, column)
        return x
    rows_first = x.movedim(dim, 0)
    rows_first.add_(torch.outer(factor * row, column).view(rows_first.shape))
    return x
