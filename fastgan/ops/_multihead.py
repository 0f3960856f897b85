"""The ops behind attention of several heads, under masks or with sinks; those of one unmasked head: ``_attention``.

q and o are (B, H, N, channels), k and v (B, H / group, M, channels), ``mask`` (B, H, N, M) without a gradient and
``sinks`` (H,), both or either None. The gradient of sinks that are None is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastgan._dispatch import differentiable, outside_autocast
from fastgan._layout import empty_rows_like
from fastgan.backend import implementation


@custom_op("fastgan::multihead_attention", mutates_args=())
@outside_autocast
def multihead_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return implementation("multihead", impl).multihead_fwd(q, k, v, scale, mask, sinks, is_causal)


@multihead_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Any, is_causal: bool, scale: float, impl: str) -> Any:
    return empty_rows_like(q, v.shape[3]), implementation("multihead", impl).empty_stats(q)


@custom_op("fastgan::multihead_attention_bwd", mutates_args=())
@outside_autocast
def multihead_bwd_op(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    o: Tensor,
    stats: Tensor,
    is_causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = implementation("multihead", impl).multihead_bwd
    return backward(grad_o, q, k, v, o, stats, scale, mask, sinks, is_causal)


@multihead_bwd_op.register_fake
def _(grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Tensor | None, *_: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _empty_sinks(q, sinks)


@custom_op("fastgan::multihead_attention_bwd_bwd", mutates_args=())
@outside_autocast
def multihead_bwd_bwd_op(
    ggq: Tensor,
    ggk: Tensor,
    ggv: Tensor,
    gg_sinks: Tensor,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    o: Tensor,
    stats: Tensor,
    is_causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    double_backward = implementation("multihead", impl).multihead_bwd_bwd
    return double_backward(ggq, ggk, ggv, gg_sinks, grad_o, q, k, v, o, stats, scale, mask, sinks, is_causal)


@multihead_bwd_bwd_op.register_fake
def _(
    ggq: Tensor,
    ggk: Tensor,
    ggv: Tensor,
    gg_sinks: Tensor,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    sinks: Tensor | None,
    o: Tensor,
    *_: Any,
) -> Any:
    return (*(torch.empty_like(x) for x in (o, q, k, v)), _empty_sinks(q, sinks))


def _empty_sinks(q: Tensor, sinks: Tensor | None) -> Tensor:
    return q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.impl = inputs
    o, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(*tensors, o, stats)


def _backward(ctx: Any, grad_o: Tensor, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk, dv, d_sinks = _multihead_bwd(grad_o, *ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.impl)
    has_sinks = ctx.saved_tensors[4] is not None
    return dq, dk, dv, None, d_sinks if has_sinks else None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_o, q, k, v, mask, sinks, o, stats = ctx.saved_tensors
    given = (q, k, v, _empty_sinks(q, None) if sinks is None else sinks)
    cotangents = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, given, strict=True)]
    *outputs, g_sinks = _multihead_bwd_bwd(
        *cotangents, grad_o, q, k, v, mask, sinks, o, stats, ctx.is_causal, ctx.scale, ctx.impl
    )
    return (*outputs, None, None if sinks is None else g_sinks, None, None, None, None, None)


def _third_order(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("attention has gradients to second order; use impl='eager' for those of higher order")


multihead = differentiable(multihead_op, _backward, _save_forward)
_multihead_bwd = differentiable(multihead_bwd_op, _backward_backward, _save_backward)
_multihead_bwd_bwd = differentiable(multihead_bwd_bwd_op, _third_order)
