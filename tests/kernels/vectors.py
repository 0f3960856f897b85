"""Vectors of a spectral norm, and the accuracy of results computed from them."""

import torch

from fastgan.backend import interpreting
from fastgan.reference import spectral_norm as reference


def random_vectors(weights, dims):
    shapes = [reference.matrix_shape(w, d) for w, d in zip(weights, dims, strict=True)]
    return tuple(
        [torch.nn.functional.normalize(torch.randn(shape[k]), dim=0).to(weights[0]) for shape in shapes] for k in (0, 1)
    )


def double(tensors):
    return [t.double() for t in tensors]


def assert_accurate(actual, plain, exact, dtype, magnitudes=None):
    """Error at most twice that of plain torch, layer by layer, and a few roundings; Triton's interpreter truncates.

    A sum is rounded in proportion to the sum of its terms' magnitudes, however small it is itself, and by how much
    depends on its order, which is the BLAS's: ``magnitudes`` are the results with all terms of one sign.
    """
    ulp = torch.finfo(dtype).eps
    for a, p, e, m in zip(actual, plain, exact, exact if magnitudes is None else magnitudes, strict=True):
        scale = m.abs().max().item()
        tolerance = 2 * (p.double() - e).abs().max().item() + 4 * torch.finfo(torch.float32).eps * scale
        if dtype == torch.bfloat16 and interpreting():
            tolerance += ulp * scale
        assert (a.double() - e).abs().max().item() <= tolerance
