"""softmax(scale Q K^T) V as an op with first and second gradients; none puts an N x M map in device memory.

Three ops: ``attention``, ``attention_bwd`` and ``attention_bwd_bwd``. The output and two statistics of each row are
saved and the probabilities recomputed. ``attention_bwd`` takes them as inputs, but its gradient regards them as
functions of q, k and v, whose gradients hold their part.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan._checks import FLOATS, check_alike, check_tensor
from fastgan._dispatch import autocast_dtype, differentiable, is_differentiated, is_transforming, outside_autocast
from fastgan._layout import empty_rows_like
from fastgan.backend import IMPLS, implementation, resolve, warn_once
from fastgan.kernels.attention.config import SINGLE_QK, unsupported
from fastgan.ops._multihead import multihead
from fastgan.reference.attention import attention_eager

# Maps up to this many bytes stay in a CPU's last-level cache, and keeping them is faster than recomputing them
# (measured at 8 to 64 MB, see bench_attention).
SMALL_MAPS = 16 << 20
ATTENTION_IMPLS = (*IMPLS, "eager")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    impl: str = "auto",
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with true reverse-over-reverse gradients in O(N) memory.

    Args:
        q: queries (B, N, d) or, of several heads, (B, H, N, d); float64 (not by Triton), float32, bfloat16 or float16;
            any strides. Triton's kernels copy operands whose rows they cannot load 16 bytes at a time.
        k: keys (B, M, d) or (B, H, M, d), dtype and device of q. A batch of 1 is broadcast, here and in v and q. Of
            fewer heads than q's, which they must divide, each serves as many of q's in turn (grouped queries).
        v: values (B, M, e) or (B, H, M, e), with the heads of k.
        scale: a finite number that multiplies the logits. **1.0, as in SAGAN**: for the 1/sqrt(d) of transformers
            pass ``d**-0.5`` or call :func:`scaled_dot_product_attention`.
        impl: "auto", "triton", "extension", "reference" or "eager". "eager" is the textbook formula, with the maps in
            memory. "auto" is "triton" on a GPU and "extension" on a CPU. If the extension is not built, maps of up to
            16 MB are kept, as by "eager". "auto" is "reference", with one warning, for more channels than Triton's
            kernels take (d 128, e 256). Within transforms of ``torch.func`` and forward-mode differentiation, which
            know no such op, maps of any size are kept, whatever ``impl`` says.
        is_causal: the i-th query sees only the keys up to the i-th.
        mask: boolean, True if the query may see the key: (B, M) for keys alone, or broadcastable to (B, N, M) or
            (B, H, N, M). Or floating-point, added to the scaled logits, of the latter shapes. It is read tile by tile
            and never expanded. Queries that see no key give 0, with gradients of 0. A mask that is itself
            differentiated (a learned bias, as large as the maps) needs "eager", which "auto" then is.
        sinks: (H,), or (1,) for operands without heads: one more logit per head, which takes part in the softmax and
            has no value. Floating-point, any dtype; differentiable.

    Returns:
        (B, N, e) or (B, H, N, e) in q's dtype (under autocast: in autocast's) and memory layout. Gradients exist to
        second order, and to any order with ``impl="eager"``.

    Raises:
        ValueError: rank, shape, dtype or device do not fit, there is no key or channel, ``scale`` is not finite,
            ``mask`` is differentiated, or ``impl`` cannot be used here.
        TypeError: ``scale`` is a tensor: multiply q by one that is to be learnt.

    Source: Zhang et al. 2019, "Self-Attention Generative Adversarial Networks", arXiv 1805.08318. Sinks: Xiao et al.
    2024, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.

    Example:
        >>> q, k, v = (torch.randn(2, 8, 64, 32, requires_grad=True) for _ in range(3))
        >>> (gradient,) = torch.autograd.grad(attention(q, k, v, 32**-0.5).sum(), q, create_graph=True)
        >>> gradient.square().sum().backward()
        >>> k.grad.shape
        torch.Size([2, 8, 64, 32])
    """
    check_attention_impl(impl)
    _check(q, k, v, scale)
    if q.ndim == 3 and mask is None and sinks is None and not is_causal:
        return attend(q, k, v, scale, impl, "eager" if impl == "eager" else resolve(impl, q))
    alone = q.ndim == 3
    if alone:
        q, k, v = q[:, None], k[:, None], v[:, None]
    mask = None if mask is None else _full_mask(mask, q, k, v, alone)
    _check_sinks(sinks, q)
    o = _attend_heads(q, k, v, scale, impl, mask, sinks, is_causal)
    return o[:, 0] if alone else o


def check_attention_impl(impl: str) -> None:
    """Raise ``ValueError`` unless ``impl`` is one of :data:`ATTENTION_IMPLS`."""
    if impl not in ATTENTION_IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, ATTENTION_IMPLS))}, got {impl!r}")


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, asked: str, impl: str) -> Tensor:
    """Compute :func:`attention` of operands that fit one another; ``asked`` was resolved to ``impl`` for them."""
    impl = _able(impl, asked, q, v)
    if impl == "triton" and q.shape[2] > SINGLE_QK:
        return _attend_heads(q[:, None], k[:, None], v[:, None], scale, asked, None, None, False)[:, 0]
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


def _attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    asked: str,
    mask: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Compute :func:`attend` for (B, H, N, channels), a mask (B, H, N, M) and sinks (H,)."""
    impl = asked if asked == "eager" else _able(resolve(asked, q), asked, q, v)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    learnt_mask = mask is not None and is_differentiated(mask)
    kept = learnt_mask or (impl == "reference" and _maps_are_small(q, k))
    if impl == "eager" or is_transforming() or (asked == "auto" and kept):
        return attention_eager(q, k, v, scale, mask, sinks, is_causal)
    if learnt_mask:
        raise ValueError(f"mask must not require a gradient for impl={asked!r}: use impl='eager' or 'auto'")
    batch = next(iter(_batches(q, k, v)), 1)
    q, k, v = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (q, k, v))
    if scale <= 0:  # as in attend
        q, scale = (-q, -scale) if scale else (0 * q, 1.0)
    return cast(Tensor, multihead(q, k, v, mask, sinks, is_causal, float(scale), impl)[0])


def _able(impl: str, asked: str, q: Tensor, v: Tensor) -> str:
    """Return ``impl``, or "reference" if the kernels do not support so many channels and were not ``asked`` for."""
    reason = unsupported(q.shape[-1], v.shape[-1]) if impl == "triton" else ""
    if not reason:
        return impl
    if asked == "triton":
        raise ValueError(reason)
    warn_once(f"attention runs its reference path: {reason}")
    return "reference"


def _maps_are_small(q: Tensor, k: Tensor) -> bool:
    if q.device.type != "cpu" or torch.compiler.is_compiling():  # a compiled graph may serve other sizes
        return False
    heads = q.shape[1] if q.ndim == 4 else 1
    return max(q.shape[0], k.shape[0]) * heads * q.shape[-2] * k.shape[-2] * q.element_size() <= SMALL_MAPS


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor: multiply q by it")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")
    check_tensor("q", q)
    if q.ndim not in (3, 4):
        raise ValueError(f"q must have 3 dimensions, or 4 with heads, got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, ndim=q.ndim)
    check_alike(q=q, k=k, v=v)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the channels d of q: (.., M, {q.shape[-1]}), got shape {tuple(k.shape)}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v must have as many rows M as k: (.., {k.shape[-2]}, e), got shape {tuple(v.shape)}")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"q and v must have at least one channel, got shapes {tuple(q.shape)} and {tuple(v.shape)}")
    if k.shape[-2] == 0:
        raise ValueError("k must have at least one key, got M = 0")
    batches = _batches(q, k, v)
    if any(batch != batches[0] for batch in batches):
        got = tuple(x.shape[0] for x in (q, k, v))
        raise ValueError(f"q, k and v must have the same batch size B (or 1, which is broadcast), got {got}")
    if q.ndim == 4:
        if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(f"k must have a number of heads that divides q's, {q.shape[1]}, got {k.shape[1]}")
        if v.shape[1] != k.shape[1]:
            raise ValueError(f"v must have as many heads as k, {k.shape[1]}, got {v.shape[1]}")


def _full_mask(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, alone: bool) -> Tensor:
    """Return a view (B, H, N, M) of ``mask``, given for operands with heads; ``alone`` if the caller's had none."""
    check_tensor("mask", mask, dtypes=(torch.bool, *FLOATS))
    if mask.device != q.device:
        raise ValueError(f"mask must be on the device of q ({q.device}), got {mask.device}")
    batch = next(iter(_batches(q, k, v)), 1)
    full = (batch, *q.shape[1:3], k.shape[2])
    given = tuple(mask.shape)
    if mask.ndim == 2 and mask.dtype == torch.bool:
        mask = mask[:, None, None]
    elif alone and mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True)):
        shape = (batch, *full[2:]) if alone else full
        raise ValueError(
            f"mask must be boolean ({batch}, {full[3]}), over keys, or broadcastable to {shape}, got {mask.dtype} of "
            f"shape {given}"
        )
    return mask.expand(full)


def _check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    if sinks is None:
        return
    check_tensor("sinks", sinks)
    if sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must have shape ({q.shape[1]},), one logit per head, got {tuple(sinks.shape)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on the device of q ({q.device}), got {sinks.device}")


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
    ggk: Tensor | None,
    ggv: Tensor | None,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    double_backward = implementation("attention", impl).attention_bwd_bwd
    if impl != "extension":  # which skips what None would be multiplied with
        ggk, ggv = torch.zeros_like(k) if ggk is None else ggk, torch.zeros_like(v) if ggv is None else ggv
    return double_backward(ggq, ggk, ggv, grad_o, q, k, v, o, stats, scale)


@attention_bwd_bwd_op.register_fake
def _(
    ggq: Tensor, ggk: Any, ggv: Any, grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *_: Any
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
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_o, q, k, v, o, stats = ctx.saved_tensors
    ggq, ggk, ggv = grads
    ggq = torch.zeros_like(q) if ggq is None else ggq
    outputs = _attention_bwd_bwd(ggq, ggk, ggv, grad_o, q, k, v, o, stats, ctx.scale, ctx.impl)
    return (*outputs, None, None, None, None)


def _third_order(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("attention has gradients to second order; use impl='eager' for those of higher order")


_attention = differentiable(attention_op, _backward, _save_forward)
_attention_bwd = differentiable(attention_bwd_op, _backward_backward, _save_backward)
_attention_bwd_bwd = differentiable(attention_bwd_bwd_op, _third_order)
