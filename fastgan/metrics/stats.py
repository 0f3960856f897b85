"""Streaming mean and covariance of features: what a Frechet distance needs of a set of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgan._checks import InputError, check_tensor
from fastgan.linalg import covariance_factor
from fastgan.metrics.moments import as_float64, centred, float64_device, joined, moments_of
from fastgan.metrics.stats_checks import check_factor, check_finite, check_moments, check_root

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch.distributed import ProcessGroup


class FeatureStats:
    """Mean and unbiased covariance of feature vectors, batch by batch, in float64 on the features' device.

    Up to ``dim`` vectors the vectors themselves are kept, so that a Frechet distance between small sets can work on
    them (:attr:`factor`) and not on a rank-deficient ``dim`` x ``dim`` matrix. From ``dim + 1`` on only the mean and
    the sum of centred outer products are. Each batch is centred on its own mean before it is joined to the others
    (:mod:`fastgan.metrics.moments`), so no digits are lost where the mean is large beside the deviation.

    Args:
        dim: features per vector; None takes it from the first batch.
        backbone: name of the network the features come from; distances between different ones are refused.
        resize: how the images were brought to that network's input size.
        precision: of the network's arithmetic; ``"mixed"`` once statistics of several are merged. It moves a distance
            by little, so that statistics of different precisions are compared, but it is told with each.
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        backbone: str | None = None,
        resize: str | None = None,
        precision: str | None = None,
    ) -> None:
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.backbone = backbone
        self.resize = resize
        self.precision = precision
        self.dtype: str | None = None  # of the features as they came
        self._dim = dim
        self._n: int | None = 0
        self._rows: list[Tensor] | None = []  # each (batch, dim); None once there are more than dim
        self._root: Tensor | None = None  # (r, dim), of what is here now
        self._mean: Tensor | None = None  # [dim], once the rows are dropped
        self._scatter: Tensor | None = None  # [dim, dim], with that mean; the covariance where n is None

    @classmethod
    def from_moments(
        cls,
        mean: Tensor | npt.ArrayLike,
        cov: Tensor | npt.ArrayLike,
        *,
        n: int | None = None,
        factor: Tensor | npt.ArrayLike | None = None,
        root: Tensor | npt.ArrayLike | None = None,
        backbone: str | None = None,
        resize: str | None = None,
        precision: str | None = None,
    ) -> FeatureStats:
        """Statistics from a mean (dim,) and an unbiased covariance (dim, dim).

        Without ``n``, the number of vectors behind them, they can be compared and saved but not extended. ``factor``,
        the centred vectors (n, dim), keeps the low-rank form of :attr:`factor` where n <= dim; ``root`` (r, dim) is
        what :meth:`root` would compute.

        Raises:
            InputError: shapes disagree, values are not finite, ``cov`` is not symmetric or has a negative diagonal,
                ``n`` is under 2, or ``factor`` or ``root`` is not that of ``cov``.
        """
        mean, cov = as_float64(mean), as_float64(cov)
        check_moments(mean, cov)
        if n is not None and n < 2:
            raise InputError(f"n must be at least 2 for a covariance, got {n}")
        stats = cls(mean.shape[0], backbone=backbone, resize=resize, precision=precision)
        stats._n, stats._rows, stats._mean = n, None, mean
        cov = (cov + cov.mT) / 2
        stats._scatter = cov if n is None else cov * (n - 1)
        if factor is not None:
            rows = as_float64(factor)
            check_factor(rows, cov, n)
            if rows.shape[0] <= rows.shape[1]:
                stats._rows, stats._mean, stats._scatter = [rows + mean], None, None
        if root is not None:
            stats._root = as_float64(root)
            check_root(stats._root, cov)
        return stats

    @property
    def n(self) -> int | None:
        """Number of vectors seen; None for statistics from a file that does not tell."""
        return self._n

    @property
    def dim(self) -> int | None:
        """Features per vector; None before the first batch."""
        return self._dim

    @property
    def mean(self) -> Tensor:
        """(dim,) float64. Raises ``InputError`` before the first vector."""
        self._require(1, "mean")
        if self._rows is not None:
            return centred(torch.cat(self._rows))[0]
        assert self._mean is not None
        return self._mean.clone()

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (divided by n - 1), (dim, dim) float64. Raises ``InputError`` under two vectors."""
        self._require(2, "cov")
        if self._n is None:
            assert self._scatter is not None
            return self._scatter.clone()
        _, scatter = self._moments()
        return scatter / (self._n - 1)

    @property
    def factor(self) -> Tensor | None:
        """Centred features X (n, dim) with ``X^T X / (n - 1) = cov``, float64, while n <= dim; None after that."""
        if self._rows is None or not self._n:
            return None
        return centred(torch.cat(self._rows))[1]

    @property
    def known_root(self) -> Tensor | None:
        """What :meth:`root` returns, where that needs no work: None for n > dim before its first call."""
        return self._root if self._rows is None or not self._n or self._n < 2 else self.root()

    def root(self) -> Tensor:
        """R (r, dim), float64, with ``R^T R = cov``: factored when first asked for, and kept until vectors are added.

        The transposed Cholesky factor, upper triangular; for a singular covariance that of a pivoted one, r its rank;
        while n <= dim, from :attr:`factor`. Distances to statistics with a known root do not factor these again.

        Raises:
            InputError: under two vectors, or the covariance has a clearly negative eigenvalue.
        """
        self._require(2, "root")
        factor = self.factor
        if factor is not None and self._n is not None:
            return factor / (self._n - 1) ** 0.5
        if self._root is None:
            try:
                self._root = covariance_factor(self.cov)
            except ValueError as error:
                raise InputError(str(error)) from error
        return self._root

    def update(self, features: Tensor | npt.ArrayLike) -> FeatureStats:
        """Add a batch of features (batch, dim) of any floating dtype; returns self.

        Raises:
            ValueError: ``features`` has another rank or dtype, another ``dim`` than before, or a value that is not
                finite (the row is named), or these statistics come from a file without ``n``.
        """
        batch = features.detach() if isinstance(features, Tensor) else torch.as_tensor(features)
        check_tensor("features", batch, ndim=2)
        self._require_known_n("update")
        self._check_dim(batch.shape[1], "features")
        check_finite(batch, seen=self._n or 0)
        if batch.shape[0] == 0:
            return self
        self.dtype = str(batch.dtype).removeprefix("torch.") if self.dtype is None else self.dtype
        self._dim = batch.shape[1]
        device = self.device or float64_device(batch.device)
        # a copy even of float64 input: the caller may write into its buffer again
        self._join_rows([batch.to(device=device, dtype=torch.float64, copy=True)])
        return self

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Add all that ``other`` has seen, as if its vectors had come here; ``other`` stays as it is. Returns self.

        Raises:
            ValueError: the dimensions, backbones or resizing methods differ, or one side comes from a file without
                ``n``.
        """
        self._require_known_n("merge")
        other._require_known_n("merge")
        if other._dim is not None:
            self._check_dim(other._dim, "other")
        check_comparable(self, other)
        self.backbone = self.backbone or other.backbone
        self.resize = self.resize or other.resize
        self.dtype = self.dtype or other.dtype
        self.precision = joint_precision([self.precision, other.precision])
        if not other._n:
            return self
        self._dim = other._dim
        device = self.device or other.device
        if other._rows is not None:
            self._join_rows([rows.to(device) for rows in other._rows])
        else:
            mean, scatter = other._moments()
            self._join_moments(other._n, mean.to(device), scatter.to(device))
        return self

    def all_reduce(self, group: ProcessGroup | None = None) -> FeatureStats:
        """Join the statistics of all processes of ``group`` (None: the default one); every process then has them all.

        A collective call: every process must make it, also one that has seen no vectors. It sends one (dim, dim) sum,
        or the vectors themselves while there are at most dim of them in all. Returns self.

        Raises:
            ValueError: the processes' dimensions, backbones or resizing methods differ, or an ``n`` is unknown.
            RuntimeError: torch.distributed is not initialised.
        """
        from fastgan.metrics.reduction import all_reduce_stats

        all_reduce_stats(self, group)
        return self

    def save(self, path: str | Path, *, root: bool = False) -> None:
        """Write an npz that pytorch-fid and clean-fid read too; see :func:`fastgan.metrics.stats_file.save_stats`."""
        from fastgan.metrics.stats_file import save_stats

        save_stats(self, path, root=root)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> FeatureStats:
        """Read an npz of this or another tool; see :func:`fastgan.metrics.stats_file.load_stats`."""
        from fastgan.metrics.stats_file import load_stats

        return load_stats(path, device=device)

    def to(self, device: torch.device | str) -> FeatureStats:
        """Move everything to ``device``, in place; returns self."""
        if self._rows is not None:
            self._rows = [rows.to(device) for rows in self._rows]
        if self._mean is not None and self._scatter is not None:
            self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)
        self._root = None if self._root is None else self._root.to(device)
        return self

    def __repr__(self) -> str:
        return f"FeatureStats(n={self._n}, dim={self._dim}, backbone={self.backbone!r}, resize={self.resize!r})"

    @property
    def device(self) -> torch.device | None:
        """Where the statistics are; None before the first vector."""
        if self._rows:
            return self._rows[0].device
        return None if self._mean is None else self._mean.device

    def rows(self) -> Tensor:
        """The vectors seen, (n, dim) float64, while they are all held. Raises ``InputError`` once they are not."""
        if self._rows is None:
            raise InputError("the vectors are not held any more")
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self._dim or 0, dtype=torch.float64)

    def moments(self, dim: int, device: torch.device) -> tuple[int, Tensor, Tensor]:
        """Number, mean (dim,) and sum of centred outer products (dim, dim), float64 copies; zeros before any row."""
        if not self._n:
            zeros = torch.zeros(dim, dim + 1, dtype=torch.float64, device=device)
            return 0, zeros[:, 0].clone(), zeros[:, 1:].contiguous()
        mean, scatter = self._moments()
        return self._n, mean.to(device, copy=True), scatter.to(device, copy=True)

    def replace_by_rows(self, rows: Tensor, *, like: FeatureStats) -> None:
        """Become the statistics of ``rows`` (n, dim), float64, n <= dim, with the header of ``like``."""
        self._take_header(like)
        self._n, self._rows, self._mean, self._scatter, self._root = rows.shape[0], [rows], None, None, None

    def replace_by_moments(self, n: int, mean: Tensor, scatter: Tensor, *, like: FeatureStats) -> None:
        """Become the statistics with these :meth:`moments` and the header of ``like``."""
        self._take_header(like)
        self._n, self._rows, self._mean, self._scatter, self._root = n, None, mean, scatter, None

    def _take_header(self, other: FeatureStats) -> None:
        self._dim, self.backbone, self.resize, self.dtype = other._dim, other.backbone, other.resize, other.dtype
        self.precision = other.precision

    def _join_rows(self, rows: list[Tensor]) -> None:
        assert self._n is not None
        assert self._dim is not None
        added = sum(r.shape[0] for r in rows)
        self._root = None
        if self._rows is not None and self._n + added <= self._dim:
            self._rows.extend(rows)
            self._n += added
            return
        self._join_moments(added, *moments_of(torch.cat(rows)))

    def _join_moments(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self._n:
            mean, scatter = joined(self._n, *self._moments(), n, mean, scatter)
            n += self._n
        self._n, self._rows, self._mean, self._scatter, self._root = n, None, mean, scatter, None

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self._rows is not None:
            return moments_of(torch.cat(self._rows))
        assert self._mean is not None
        assert self._scatter is not None
        return self._mean, self._scatter

    def _require(self, least: int, what: str) -> None:
        if self._n is not None and self._n < least:
            raise InputError(f"{what} needs at least {least} feature vector{'s' * (least > 1)}, there are {self._n}")

    def _require_known_n(self, action: str) -> None:
        if self._n is None:
            raise InputError(
                f"cannot {action} statistics whose n is unknown (they come from a file with mu and sigma only)"
            )

    def _check_dim(self, dim: int, name: str) -> None:
        if dim < 1:
            raise InputError(f"{name} must have at least one feature per vector, got {dim}")
        if self._dim is not None and dim != self._dim:
            raise InputError(f"{name} must have {self._dim} features per vector, got {dim}")


def joint_precision(precisions: Iterable[str | None]) -> str | None:
    """Of statistics of these precisions together, as far as they are known."""
    known = {precision for precision in precisions if precision is not None}
    return "mixed" if len(known) > 1 else next(iter(known), None)


def check_comparable(a: FeatureStats, b: FeatureStats) -> None:
    """Raise ``InputError`` unless ``a`` and ``b`` agree in dim, backbone and resizing, as far as each is known."""
    for what in ("dim", "backbone", "resize"):
        left, right = getattr(a, what), getattr(b, what)
        if left is not None and right is not None and left != right:
            raise InputError(f"the two statistics differ in {what}: {left} and {right}")
