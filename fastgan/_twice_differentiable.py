"""torch's fused attention has no derivative of its gradient: errors that name the cure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_NO_DERIVATIVE = re.compile(r"derivative for aten::_scaled_dot_product_\w+ is not implemented")
_CURE = (
    "F.scaled_dot_product_attention cannot be differentiated twice, which a gradient penalty needs: run the network "
    "within `with fastgan.nn.second_order_attention():`, or call fastgan.ops.scaled_dot_product_attention instead"
)


@contextmanager
def cure_named() -> Iterator[None]:
    """Raise a ``RuntimeError`` that names the cure from torch's own about a derivative of its attention."""
    try:
        yield
    except RuntimeError as error:
        if _NO_DERIVATIVE.search(str(error)):
            raise RuntimeError(_CURE) from error
        raise


def check_twice_differentiable(output: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Raise now what a backward through ``gradient``, that of ``output`` in ``x``, would raise of torch's attention."""
    if not torch.compiler.is_compiling() and _passes_through_torchs_attention(output):
        with cure_named():
            torch.autograd.grad(gradient.sum(), x, retain_graph=True, allow_unused=True)


def _passes_through_torchs_attention(output: Tensor) -> bool:
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith("ScaledDotProduct"):
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False
