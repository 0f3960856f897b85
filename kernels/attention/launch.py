"""Launchers of the fused attention kernels: same names, arguments and results as in ``fastgan.reference.attention``.

Forward, backward and double backward each stream over tiles; none has an N x M map in memory. They take 1, 2 and 2
launches, one more for each kernel where v's channels are split into slabs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastgan._layout import empty_rows_like
from fastgan.kernels.attention.config import Launch, launch_for, padded
from fastgan.kernels.attention.double_backward import attention_bwd_bwd_keys_kernel, attention_bwd_bwd_rows_kernel
from fastgan.kernels.attention.kernels import attention_bwd_keys_kernel, attention_bwd_rows_kernel, attention_fwd_kernel
from fastgan.kernels.device import on_its_device
from fastgan.kernels.precision import input_precision


@on_its_device
def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, e) in q's dtype and two statistics of each row, float32 (2, B, N).

    They are the largest logit, top = max(q k^T), and log(sum(exp(scale (q k^T - top)))). Kept apart, they give P back
    as exactly as eager softmax computes it, however large the logits; their sum, the log-sum-exp, would not.
    ``scale`` must be >= 0.
    """
    (b, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    o, stats = empty_rows_like(q, e), empty_stats(q)
    if o.numel():
        launch = launch_for("fwd", e, q)
        attention_fwd_kernel[(triton.cdiv(n, launch.rows) * b, triton.cdiv(e, launch.slab))](
            q, k, v, o, stats, *_strides(q, k, v, o),
            n, m, d, e, scale, b * n, D=padded(d), **_options(launch, q)
        )  # fmt: skip
    return o, stats


def empty_stats(q: Tensor) -> Tensor:
    """Memory for the statistics of each row."""
    return q.new_empty(2, *q.shape[:2], dtype=torch.float32)


@on_its_device
def attention_bwd(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastgan.reference.attention.attention_bwd`."""
    (b, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    if not b * n:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = stats.new_empty(b, n)
    sizes = {"D": padded(d), "E": padded(e)}
    launch = launch_for("bwd_rows", e, q)
    attention_bwd_rows_kernel[(triton.cdiv(n, launch.rows) * b,)](
        grad_o, q, k, v, o, stats, delta, dq, *_strides(grad_o, q, k, v, o, dq),
        n, m, d, e, scale, b * n, **sizes, **_options(launch, q)
    )  # fmt: skip
    launch = launch_for("bwd_keys", e, q)
    for outputs, slabs in launch.passes(e):
        attention_bwd_keys_kernel[(triton.cdiv(m, launch.keys) * b, slabs)](
            grad_o, q, k, v, stats, delta, dk, dv, *_strides(grad_o, q, k, v, dk, dv),
            n, m, d, e, scale, b * n, **sizes, **outputs, **_options(launch, q)
        )  # fmt: skip
    return dq, dk, dv


@on_its_device
def attention_bwd_bwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastgan.reference.attention.attention_bwd_bwd`, where the formulas are."""
    (b, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    if not b * n:
        return torch.zeros_like(o), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    g_do, gq, gk, gv = torch.empty_like(o), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sums = stats.new_empty(3, b, n)  # delta, rowsum(A * P), rowsum(P * B)
    strides = _strides(ggq, ggk, ggv, grad_o, q, k, v)
    sizes = {"D": padded(d), "E": padded(e)}
    launch = launch_for("bwd_bwd_rows", e, q)
    for outputs, slabs in launch.passes(e):
        attention_bwd_bwd_rows_kernel[(triton.cdiv(n, launch.rows) * b, slabs)](
            ggq, ggk, ggv, grad_o, q, k, v, o, stats, sums, g_do, gq, *strides, *_strides(o, g_do, gq),
            n, m, d, e, scale, b * n, **sizes, **outputs, **_second_options(launch, q)
        )  # fmt: skip
    launch = launch_for("bwd_bwd_keys", e, q)
    for outputs, slabs in launch.passes(e):
        attention_bwd_bwd_keys_kernel[(triton.cdiv(m, launch.keys) * b, slabs)](
            ggq, ggk, ggv, grad_o, q, k, v, stats, sums, gk, gv, *strides, *_strides(gk, gv),
            n, m, d, e, scale, b * n, **sizes, **outputs, **_second_options(launch, q)
        )  # fmt: skip
    return g_do, gq, gk, gv


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()]


def _second_options(launch: Launch, q: Tensor) -> dict[str, int | str]:
    options = _options(launch, q)
    return options | {"LOGITS": options["PRECISION"]} | ({"PRECISION": "ieee"} if launch.scalar else {})


def _options(launch: Launch, q: Tensor) -> dict[str, int | str]:
    return {
        "R": launch.rows,
        "C": launch.keys,
        "SLAB": launch.slab,
        "PRECISION": input_precision(q.dtype),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
