"""Cholesky factor with complete pivoting on a CPU: dispatch (C++ extension, or plain PyTorch)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backend
from fastgan.linalg import _pivoted_reference as reference


def semidefinite_rows(a: Tensor) -> Tensor | None:
    """R (r, d) with R^T R = A up to rounding, r the rank of A; None where A is not semi-definite to rounding.

    Args:
        a: (d, d) float64, symmetric, contiguous, on a CPU.
    """
    compute = torch.ops.fastgan_C.pivoted_cholesky if backend.extension_available("cpu") else reference.pivoted_cholesky
    rows, _, remainder = compute(a)
    return rows if reference.is_semidefinite(a, remainder) else None
