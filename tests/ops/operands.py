"""Operands of the ops, their results in plain PyTorch, derivatives of both orders, and checks for every impl."""

import torch
import torch.nn.functional as F
from torch.library import opcheck

from fastgan.ops import attention
from fastgan.ops._multihead import multihead_bwd_bwd_op, multihead_bwd_op, multihead_op

LAYOUTS = [torch.contiguous_format, torch.channels_last]
MASKS = ["none", "causal", "keys", "boolean", "additive", "causal and keys"]
"""Cases of :func:`masks`."""


def operands(shape, dtype=torch.float64, requires_grad=True):
    b, n, m, d, e = shape
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in ((b, n, d), (b, m, d), (b, m, e))]


def three_passes(function, q, k, v):
    """Output, first gradients and gradients of a penalty on them, for fixed cotangents."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = function(q, k, v)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, q, k, v)]
    first = torch.autograd.grad(o, (q, k, v), cotangents[0], create_graph=True)
    second = torch.autograd.grad(first, (q, k, v), cotangents[1:])
    return [o, *first, *second]


def block_operands(batch, height, channels, dtype, layout, device):
    """q, k and v as the canonical block makes them; channels-last, k and v are parts of one tensor."""
    n, d, e = height**2, channels // 8, channels // 2
    if layout == "channels-first":
        q, k, v = (torch.randn(batch, c, r, device=device) for c, r in ((d, n), (d, n // 4), (e, n // 4)))
        return [x.to(dtype).mT for x in (q / d**0.25, k / d**0.25, v)]
    q, kv = (torch.randn(batch, r, c, device=device) / d**0.25 for r, c in ((n, d), (n // 4, d + e)))
    return [q.to(dtype), *kv.to(dtype).split((d, e), dim=2)]


def images(shape, layout, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()


def pooled_operands(shape, outputs, dtype=torch.float64, layout=torch.contiguous_format, bias=True):
    x = images(shape, layout, dtype)
    weight = torch.randn(outputs, shape[1], dtype=dtype).requires_grad_()
    return x, weight, torch.randn(outputs, dtype=dtype).requires_grad_() if bias else None


def plain_pooled(x, weight, bias, d):
    y = F.conv2d(x, weight[:, :, None, None], bias)
    return y[:, :d].flatten(2).mT, F.max_pool2d(y[:, d:], 2).flatten(2).mT


def residual_operands(shape, e, dtype=torch.float64, layout=torch.contiguous_format, bias=True):
    b, c, h, w = shape
    rows, weight = (torch.randn(s, dtype=dtype).requires_grad_() for s in ((b, h * w, e), (c, e)))
    return rows, weight, torch.randn(c, dtype=dtype).requires_grad_() if bias else None, images(shape, layout, dtype)


def plain_residual(rows, weight, bias, x):
    return x + F.conv2d(rows.mT.unflatten(2, x.shape[2:]), weight[:, :, None, None], bias)


def three_orders(function, *inputs):
    """Outputs, first gradients and gradients of a penalty on them, for fixed cotangents, the same in every dtype."""
    inputs = [x.detach().requires_grad_() for x in inputs if x is not None]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)

    def cotangents(tensors):
        return [torch.randn(t.shape, generator=generator, dtype=torch.float64).bfloat16().to(t) for t in tensors]

    cotangent = [c.requires_grad_() for c in cotangents(outputs)]
    first = torch.autograd.grad(outputs, inputs, cotangent, create_graph=True)
    penalty = sum((g * c).sum() for g, c in zip(first, cotangents(first), strict=True))
    wanted = [*inputs, *cotangent]
    second = torch.autograd.grad(penalty, wanted, allow_unused=True)
    zeros = (torch.zeros_like(t) for t in wanted)
    return [*outputs, *first, *(z if g is None else g for g, z in zip(second, zeros, strict=True))]


def sizes_of_three_orders(function, q, k, v, sinks=None, *, mask=None, is_causal=False):
    """Norms that rounding in ``three_orders`` of attention with heads is measured by, 0 for that of the result itself.

    A gradient of ``sinks`` is a sum over batch and rows that may cancel: its size is the norm of its terms, which are
    the gradients of a sink per row, here the logit of one more key whose value is 0. ``function(q, k, v, mask=)``.
    """
    if sinks is None:
        return [0.0] * 8
    q, k, v, sinks = (x.detach().double() for x in (q, k, v, sinks))
    shape = (*q.shape[:-1], k.shape[-2])
    logits = torch.zeros(shape, dtype=q.dtype, device=q.device)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask.double().expand(shape)
    if is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), float("-inf"))

    def with_a_sink_per_row(q, k, v, sinks):
        return function(
            q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), mask=torch.cat((logits, sinks[..., None]), dim=-1)
        )

    _, _, _, _, first, _, _, _, second, _ = three_orders(
        with_a_sink_per_row, q, k, v, sinks[:, None].expand(shape[:-1])
    )
    return [0.0, 0.0, 0.0, 0.0, first.norm().item(), 0.0, 0.0, 0.0, second.norm().item(), 0.0]


def head_operands(b, h, key_heads, n, m, d, e, dtype=torch.float64, requires_grad=True):
    """q, k, v of several heads and their sinks."""
    shapes = ((b, h, n, d), (b, key_heads, m, d), (b, key_heads, m, e), (h,))
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


def masks(case, b, h, n, m):
    """Masks for ``attention``, and the same ones for ``attention_eager``; some rows see no key."""
    causal = {"is_causal": True} if "causal" in case else {}
    if "keys" in case:
        mask = torch.rand(b, m) < 0.7
        return {"mask": mask, **causal}, {"mask": mask[:, None, None].expand(b, h, n, m), **causal}
    if case == "boolean":
        mask = torch.rand(b, 1, n, m) < 0.6
        mask[0, :, 0] = False
    elif case == "additive":
        mask = torch.randn(1, h, n, m, dtype=torch.float64).masked_fill(torch.rand(1, h, n, m) < 0.2, float("-inf"))
    else:
        return causal, causal
    return {"mask": mask}, {"mask": mask.expand(b, h, n, m)}


def opcheck_multihead(impl, case, has_sinks):
    """Run ``opcheck`` on the ops of attention with heads and of its gradients."""
    q, k, v, sinks = head_operands(2, 4, 2, 5, 4, 3, 2)
    sinks = sinks if has_sinks else None
    mask = masks(case, 2, 4, 5, 4)[1].get("mask")
    rest = (True, 0.7, impl)
    opcheck(multihead_op, (q, k, v, mask, sinks, *rest))
    o, stats = (x.detach() for x in multihead_op(q, k, v, mask, sinks, *rest))
    grad_o = torch.randn_like(o).requires_grad_()
    opcheck(multihead_bwd_op, (grad_o, q, k, v, mask, sinks, o, stats, *rest))
    q, k, v, sinks = (None if x is None else x.detach() for x in (q, k, v, sinks))
    cotangents = (q, k, v, q.new_empty(0) if sinks is None else sinks)
    opcheck(multihead_bwd_bwd_op, (*cotangents, grad_o.detach(), q, k, v, mask, sinks, o, stats, *rest))


def gradcheck_multihead(impl, case, has_sinks):
    """Compare the gradients of both orders of attention with heads with finite differences."""
    inputs = head_operands(2, 2, 1, 3, 4, 2, 3)[: 4 if has_sinks else 3]
    options, _ = masks(case, 2, 2, 3, 4)

    def run(q, k, v, sinks=None):
        return attention(q, k, v, 0.7, impl, sinks=sinks, **options)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
