"""torch's ``scaled_dot_product_attention`` by the op of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._checks import FLOATS, check_tensor
from fastgan._dispatch import autocast_dtype
from fastgan.ops._attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    impl: str = "auto",
) -> Tensor:
    """Compute what ``torch.nn.functional.scaled_dot_product_attention`` does, with gradients of gradients in O(N).

    Args:
        query, key, value: (..., N, d), (..., M, d) and (..., M, e) with leading dimensions that broadcast.
        attn_mask: broadcastable to (..., N, M): boolean, True if the query may see the key, or added to the logits.
            One that is differentiated keeps the maps in memory.
        dropout_p: 0, as random maps cannot be recomputed.
        is_causal: the i-th query sees the keys up to the i-th alone; not together with ``attn_mask``.
        scale: multiplies the logits; None for 1/sqrt(d).
        enable_gqa: key and value may have fewer heads (dimension -3) than query, a divisor of its.
        impl: as in :func:`attention`.

    Returns:
        (..., N, e), as :func:`attention` does.

    Raises:
        ValueError: ``dropout_p`` is not 0, ``attn_mask`` is combined with ``is_causal``, or as for :func:`attention`.

    Example:
        >>> import torch.nn.functional as F
        >>> q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
        >>> torch.dist(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 1e-5
        tensor(True)
    """
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0 (put the module in eval mode or set its dropout to 0), got {dropout_p}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None if is_causal is True: combine the two in the mask")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(x.shape)}")
    dtype = autocast_dtype(query)
    if dtype is not None:  # as torch's, which takes operands of several dtypes under autocast
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if not (enable_gqa and query.ndim >= 3):
        shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
        try:
            leading = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            got = ", ".join(map(str, shapes))
            raise ValueError(f"query, key and value must have leading dimensions that broadcast, got {got}") from None
        query, key, value = (x.expand(*leading, -1, -1) for x in (query, key, value))
    shape = query.shape[:-2]
    q, k, v = (_as_heads(x) for x in (query, key, value))
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask, dtypes=(torch.bool, *FLOATS))
        full = (*shape, query.shape[-2], key.shape[-2])
        try:
            attn_mask = _as_heads(attn_mask.expand(full))
        except RuntimeError:
            given = tuple(attn_mask.shape)
            raise ValueError(f"attn_mask must be broadcastable to {tuple(full)}, got {given}") from None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    o = attention(q, k, v, scale, impl, is_causal=is_causal, mask=attn_mask)
    return o if query.ndim == 4 else o.reshape(*shape, *o.shape[-2:])


def _as_heads(x: Tensor) -> Tensor:
    """(..., N, d) with any number of leading dimensions as (B, H, N, d)."""
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    return x.flatten(0, -4)
