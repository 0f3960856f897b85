"""x + rows weight^T, rows laid out as a feature map: the output projection with its residual, in plain PyTorch.

The gradient is made of differentiable PyTorch functions for the kernel too: it is exact to every order.
"""

from __future__ import annotations

from torch import Tensor

from fastgan._layout import image_like, rows_of


def projection_residual_fwd(rows: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """rows (B, H W, e), weight (C, e), bias (C) or None, x (B, C, H, W) -> (B, C, H, W) in x's dtype and layout."""
    projected = rows @ weight.mT
    if bias is not None:
        projected = projected + bias
    y = image_like(x)
    return y.copy_(x + projected.mT.unflatten(2, x.shape[2:]))


def projection_residual_bwd(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (drows, dweight, dbias) for ``grad`` (B, C, H, W); that of x is ``grad`` itself."""
    grad_rows = rows_of(grad.to(weight.dtype))
    return grad_rows @ weight, (grad_rows.mT @ rows).sum(dim=0), grad_rows.sum(dim=(0, 1))
