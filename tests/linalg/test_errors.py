"""Errors of trace_sqrt_product name the argument and the violation that was measured."""

import math

import pytest
import torch
from torch import Tensor

from fastgan.linalg import trace_sqrt_product
from tests.linalg.spectra import IMPLS, covariance


def asymmetric(d: int) -> Tensor:
    a = covariance(d)
    a[0, 1] += 0.1
    return a


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("operand", "message"),
    [
        (torch.ones(3, 4), r"must have shape \(\.\.\., d, d\)"),
        (torch.ones(3), r"must have shape \(\.\.\., d, d\)"),
        (torch.ones(0, 0), "d >= 1"),
        (torch.ones(3, 3, dtype=torch.int64), "must have dtype float32, float64, got int64"),
        (torch.ones(3, 3, dtype=torch.float16), "must have dtype float32, float64, got float16"),
        (torch.full((3, 3), math.nan).double(), "must be finite"),
        (torch.diag(torch.tensor([1.0, math.inf, 1.0])).double(), "must be finite"),
        (torch.diag(torch.tensor([1.0, math.nan, 1.0])).double(), "must be finite"),
        (asymmetric(3), r"must be symmetric: max \|A - A\^T\| is 0\.1,"),
        (
            torch.diag(torch.tensor([1.0, 1.0, -0.5])).double(),
            r"must be positive semi-definite: .* is -0\.5 of the largest",
        ),
        (-torch.eye(3).double(), "must be positive semi-definite"),
        (torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).double(), "must be positive semi-definite"),
    ],
)
def test_bad_operand(operand, message, impl):
    good = torch.eye(3).double()
    with pytest.raises(ValueError, match=rf"^a\b.*{message}"):
        trace_sqrt_product(operand, good, impl=impl)
    with pytest.raises(ValueError, match=rf"^b\b.*{message}"):
        trace_sqrt_product(good, operand, impl=impl)


@pytest.mark.parametrize("method", ["auto", "cholesky", "eigh", "svd"])
@pytest.mark.parametrize("left", ["definite", "singular", "zero"])
def test_indefinite_with_any_other(left, method):
    others = {
        "definite": covariance(3),
        "singular": torch.diag(torch.tensor([1.0, 1.0, 0.0])).double(),
        "zero": torch.zeros(3, 3).double(),
    }
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.01])).double()
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"^b must be positive semi-definite"):
            trace_sqrt_product(others[left], indefinite, method=method, impl=impl)


def test_bad_pairs():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match=r"b must have the d of a \(3\), got 4"):
        trace_sqrt_product(eye, torch.eye(4))
    with pytest.raises(
        ValueError, match=r"b must have batch dimensions that broadcast with those of a: \(2,\), got \(3,\)"
    ):
        trace_sqrt_product(eye.expand(2, 3, 3), eye.expand(3, 3, 3))
    with pytest.raises(ValueError, match="b must have the dtype of a"):
        trace_sqrt_product(eye, eye.double())
    with pytest.raises(ValueError, match="b must be on the device of a"):
        trace_sqrt_product(eye, eye.to("meta"))


def test_bad_options():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="method must be one of 'auto', 'cholesky', .*, got 'schur'"):
        trace_sqrt_product(eye, eye, method="schur")
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'extension', 'reference', got 'triton'"):
        trace_sqrt_product(eye, eye, impl="triton")
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor, got list"):
        trace_sqrt_product(eye, [1])


def test_cholesky_of_a_singular_matrix_says_which():
    singular, stack = torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2).expand(3, 2, 2)
    with pytest.raises(ValueError, match=r"^a must be positive definite for method='cholesky'"):
        trace_sqrt_product(singular, torch.eye(2), method="cholesky")
    with pytest.raises(ValueError, match=r"^b must be positive definite for method='cholesky'"):
        trace_sqrt_product(stack, singular, method="cholesky")


def test_bad_matrix_of_a_batch_is_numbered():
    batch = torch.eye(3).repeat(2, 2, 1, 1)
    batch[1, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="^a, matrix 2 of the flattened batch, must be finite, got 1 NaN .* of 9 entr"):
        trace_sqrt_product(batch, torch.eye(3))
    batch[1, 0, 2, 2] = -1
    with pytest.raises(ValueError, match="^a, matrix 2 of the flattened batch, must be positive semi-definite: .* -1"):
        trace_sqrt_product(batch, torch.eye(3))
