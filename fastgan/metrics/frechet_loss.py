"""The Frechet distance as something to train with."""

from __future__ import annotations

from torch import Tensor, nn

from fastgan._checks import InputError
from fastgan.linalg import drop_redundant_row, nuclear_norm
from fastgan.metrics.stats import FeatureStats


class FrechetLoss(nn.Module):
    """The Frechet distance of a batch of features to fixed statistics, differentiable in the features.

    The cross term is the nuclear norm of X R^T / sqrt(n - 1), with X the centred features and R^T R the reference's
    covariance: an (n, dim) matrix, so a batch smaller than ``dim`` costs little. The distance of so few vectors is
    biased far upwards, but for a fixed batch size so is that of real ones (Mathiasen & Hvilshoj, "Backpropagating
    through Frechet Inception Distance", 2020).

    Args:
        reference: statistics to approach.

    Raises:
        InputError: ``reference`` has fewer than two vectors.
    """

    mean: Tensor
    factor: Tensor
    trace: Tensor

    def __init__(self, reference: FeatureStats) -> None:
        super().__init__()
        self.register_buffer("mean", reference.mean)
        self.register_buffer("factor", drop_redundant_row(reference.root()).mT.contiguous())
        self.register_buffer("trace", reference.cov.trace())

    def forward(self, features: Tensor) -> Tensor:
        """A scalar of the dtype of ``features`` (n, dim), computed in float64.

        Raises:
            InputError: ``features`` are not (n, dim) with n >= 2 and the reference's dim.
        """
        dim = self.mean.shape[0]
        if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] != dim:
            raise InputError(f"features must have shape (n, {dim}) with n >= 2, got {tuple(features.shape)}")
        rows = features.double()
        mean = rows.mean(dim=0)
        centred = (rows - mean) / (len(rows) - 1) ** 0.5
        cross = nuclear_norm(drop_redundant_row(centred) @ self.factor)
        distance = (mean - self.mean).square().sum() + centred.square().sum() + self.trace - 2 * cross
        return distance.to(features.dtype)
