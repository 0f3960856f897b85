"""The project's tolerance: twice the error of plain torch in the same dtype, plus a floor, against float64."""

import torch

FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def relative_error(actual, truth, size=0.0):
    """Return |actual - truth| / max(|truth|, size) in the Frobenius norm; infinite if anything is not finite."""
    difference = (actual.double() - truth.double()).norm() / truth.double().norm().clamp_min(max(size, 1e-30))
    return difference.item() if difference.isfinite() else float("inf")


def assert_as_accurate(actual, plain, truth, name="output", size=0.0):
    """Compare errors: ``plain`` is eager torch's result in the dtype of ``actual``, ``truth`` is float64.

    ``size`` is the norm of the terms of a sum that may cancel: rounding is proportional to them, not to their sum.
    """
    error = relative_error(actual, truth, size)
    allowed = 2 * relative_error(plain, truth, size) + FLOOR[actual.dtype]
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
