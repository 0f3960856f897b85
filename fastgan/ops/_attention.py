"""softmax(scale Q K^T) V as an op with first and second gradients, none of which puts an N x M map in device memory.

Three ops: ``attention``, ``attention_bwd`` and ``attention_bwd_bwd``. The output and two statistics of each row are
saved and the probabilities recomputed. ``attention_bwd`` takes them as inputs, but its gradient regards them as
functions of q, k and v, whose gradients hold their part.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan._checks import check_alike, check_tensor
from fastgan._dispatch import autocast_dtype, differentiable, is_transforming, outside_autocast
from fastgan._layout import empty_rows_like
from fastgan.backend import IMPLS, implementation, resolve, warn_once
from fastgan.kernels.attention.config import unsupported
from fastgan.reference.attention import attention_eager

# Maps of at most so many bytes stay in a CPU's last-level cache, where keeping them is quicker than recomputing them
# (measured at 8 to 64 MB, see bench_attention).
SMALL_MAPS = 16 << 20
ATTENTION_IMPLS = (*IMPLS, "eager")


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, impl: str = "auto") -> Tensor:
    """Attention with true reverse-over-reverse gradients in O(N) memory.

    Args:
        q: queries (B, N, d); float64 (not by Triton), float32, bfloat16 or float16; any strides.
        k: keys (B, M, d), dtype and device of q. A batch of 1 is broadcast, here and in v and q.
        v: values (B, M, e).
        scale: a finite number that multiplies the logits. 1.0 as in SAGAN, where there is no 1/sqrt(d).
        impl: "auto", "triton", "extension", "reference" or "eager". "eager" is the textbook formula, with the maps in
            memory. "auto" is "extension" on a CPU and "triton" on a GPU. If the extension is not built, it keeps maps
            of up to 16 MB, as "eager", and is "reference" above; so it is, with one warning, for more channels than
            Triton's kernels take (d 64, e 256). Within transforms of ``torch.func`` and forward-mode differentiation,
            which know no such op, maps of any size are kept, whatever ``impl`` says.

    Returns:
        (B, N, e) in q's dtype (under autocast: in autocast's) and memory layout. Gradients exist to second order, and
        to any order with ``impl="eager"``.

    Raises:
        ValueError: rank, shape, dtype or device do not fit, there is no key or channel, ``scale`` is not finite, or
            ``impl`` cannot be used here.
        TypeError: ``scale`` is a tensor: multiply q by one that is to be learnt.

    Source: Zhang et al. 2019, "Self-Attention Generative Adversarial Networks", arXiv 1805.08318.
    """
    check_attention_impl(impl)
    _check(q, k, v, scale)
    return attend(q, k, v, scale, impl, "eager" if impl == "eager" else resolve(impl, q))


def check_attention_impl(impl: str) -> None:
    """Raise ``ValueError`` unless ``impl`` is one of :data:`ATTENTION_IMPLS`."""
    if impl not in ATTENTION_IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, ATTENTION_IMPLS))}, got {impl!r}")


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, asked: str, impl: str) -> Tensor:
    """Compute :func:`attention` of operands that fit one another; ``asked`` was resolved to ``impl`` for them."""
    reason = unsupported(q.shape[2], v.shape[2]) if impl == "triton" else ""
    if reason:
        if asked == "triton":
            raise ValueError(reason)
        warn_once(f"attention runs its reference path: {reason}")
        impl = "reference"
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if impl == "eager" or is_transforming() or (asked == "auto" and impl == "reference" and _maps_are_small(q, k)):
        return attention_eager(q, k, v, scale)
    batch = next(iter(_batches(q, k, v)), 1)
    q, k, v = (x if x.shape[0] == batch else x.expand(batch, -1, -1) for x in (q, k, v))
    if scale <= 0:  # the ops keep each row's largest logit, which a negative scale would turn into the smallest
        q, scale = (-q, -scale) if scale else (0 * q, 1.0)
    return cast(Tensor, _attention(q, k, v, float(scale), impl)[0])


def _maps_are_small(q: Tensor, k: Tensor) -> bool:
    if q.device.type != "cpu" or torch.compiler.is_compiling():  # a compiled graph may serve other sizes
        return False
    return max(q.shape[0], k.shape[0]) * q.shape[1] * k.shape[1] * q.element_size() <= SMALL_MAPS


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor: multiply q by it")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, ndim=3)
    check_alike(q=q, k=k, v=v)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have the channels d of q: (B, M, {q.shape[2]}), got shape {tuple(k.shape)}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v must have as many rows M as k: (B, {k.shape[1]}, e), got shape {tuple(v.shape)}")
    if q.shape[2] == 0 or v.shape[2] == 0:
        raise ValueError(f"q and v must have at least one channel, got shapes {tuple(q.shape)} and {tuple(v.shape)}")
    if k.shape[1] == 0:
        raise ValueError("k must have at least one key, got M = 0")
    batches = _batches(q, k, v)
    if any(batch != batches[0] for batch in batches):
        got = tuple(x.shape[0] for x in (q, k, v))
        raise ValueError(f"q, k and v must have the same batch size B (or 1, which is broadcast), got {got}")


def _batches(q: Tensor, k: Tensor, v: Tensor) -> list[int]:
    """Batch sizes that are not broadcast; in a list, as a set would tie a compiled graph to their values."""
    return [x.shape[0] for x in (q, k, v) if x.shape[0] != 1]


@custom_op("fastgan::attention", mutates_args=())
@outside_autocast
def attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    return implementation("attention", impl).attention_fwd(q, k, v, scale)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    return empty_rows_like(q, v.shape[2]), implementation("attention", impl).empty_stats(q)


@custom_op("fastgan::attention_bwd", mutates_args=())
@outside_autocast
def attention_bwd_op(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("attention", impl).attention_bwd(grad_o, q, k, v, o, stats, scale)


@attention_bwd_op.register_fake
def _(grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@custom_op("fastgan::attention_bwd_bwd", mutates_args=())
@outside_autocast
def attention_bwd_bwd_op(
    ggq: Tensor,
    ggk: Tensor,
    ggv: Tensor,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation("attention", impl).attention_bwd_bwd(ggq, ggk, ggv, grad_o, q, k, v, o, stats, scale)


@attention_bwd_bwd_op.register_fake
def _(
    ggq: Tensor, ggk: Tensor, ggv: Tensor, grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(o), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.impl = inputs
    o, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(q, k, v, o, stats)


def _backward(ctx: Any, grad_o: Tensor, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, stats = ctx.saved_tensors
    return (*_attention_bwd(grad_o, q, k, v, o, stats, ctx.scale, ctx.impl), None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_o, q, k, v, o, stats = ctx.saved_tensors
    ggq, ggk, ggv = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, (q, k, v), strict=True))
    outputs = _attention_bwd_bwd(ggq, ggk, ggv, grad_o, q, k, v, o, stats, ctx.scale, ctx.impl)
    return (*outputs, None, None, None, None)


def _third_order(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("attention has gradients to second order; use impl='eager' for those of higher order")


_attention = differentiable(attention_op, _backward, _save_forward)
_attention_bwd = differentiable(attention_bwd_op, _backward_backward, _save_backward)
_attention_bwd_bwd = differentiable(attention_bwd_bwd_op, _third_order)
