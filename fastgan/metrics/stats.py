"""Streaming mean and covariance of features: all that a Frechet distance needs of a set of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import fastgan
from fastgan._checks import InputError, check_tensor
from fastgan.data.archives import read_npz
from fastgan.distributed import collective_device, gather_objects, gather_parts
from fastgan.linalg import covariance_factor
from fastgan.metrics.moments import (
    as_features,
    as_float64,
    centered,
    check_factor,
    check_moments,
    check_root,
    float64_device,
    joined,
    moments_of,
    rounding_of,
)
from fastgan.metrics.protocols import protocol_of_old_file
from fastgan.metrics.stats_file import moment_keys, scalar, write_npz

if TYPE_CHECKING:
    import numpy.typing as npt

_TEXTS = ("backbone", "protocol", "resize", "precision", "dtype")
_IDENTITY = ("dim", "backbone", "protocol", "resize")


class FeatureStats:
    """Mean and unbiased covariance of feature vectors, batch by batch, in float64 on the features' device.

    Up to ``dim`` vectors the vectors themselves are kept, so that a Frechet distance between small sets can work on
    them (:attr:`factor`) and not on a rank-deficient ``dim`` x ``dim`` matrix. From ``dim + 1`` on only the mean and
    the sum of centered outer products are. Each batch is centered on its own mean before it is joined to the others
    (:mod:`fastgan.metrics.moments`), so no digits are lost where the mean is large beside the deviation.

    Args:
        dim: features per vector; None takes it from the first batch.
        backbone: name of the network the features come from; distances between different ones are refused.
        protocol: how images became that network's input, a name of :mod:`fastgan.metrics.protocols`; different ones are
            refused likewise.
        resize: the protocol's way to the network's input size.
        precision: of the network's arithmetic; ``"mixed"`` once statistics of several are merged. It moves a distance
            by little, so statistics of different precisions are compared, and each is printed with its own.

    Example:
        >>> stats = FeatureStats().update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> stats.n, stats.mean
        (2, tensor([2., 0.], dtype=torch.float64))
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        backbone: str | None = None,
        protocol: str | None = None,
        resize: str | None = None,
        precision: str | None = None,
    ) -> None:
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.backbone = backbone
        self.protocol = protocol
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
        protocol: str | None = None,
        resize: str | None = None,
        precision: str | None = None,
    ) -> FeatureStats:
        """Statistics from a mean (dim,) and an unbiased covariance (dim, dim).

        Without ``n``, the number of vectors behind them, they can be compared and saved but not extended. ``factor``,
        the centered vectors (n, dim), keeps the low-rank form of :attr:`factor` where n <= dim; ``root`` (r, dim) is
        what :meth:`root` would compute.

        Raises:
            InputError: shapes disagree, values are not finite, ``cov`` is not symmetric or has a negative diagonal,
                ``n`` is under 2, or ``factor`` or ``root`` is not that of ``cov``.
        """
        rounding = rounding_of(cov)
        mean, cov = as_float64(mean), as_float64(cov)
        if (mean.ndim == 2 and 1 in mean.shape) or mean.ndim == 0:  # a row, a column, or one feature as a number
            mean = mean.reshape(-1)
        if (cov.ndim == 3 and len(cov) == 1) or cov.numel() == len(mean) == 1:
            cov = cov.reshape(len(mean), -1)
        check_moments(mean, cov, rounding)
        if n is not None and (not isinstance(n, int | np.integer) or n < 2):
            raise InputError(f"n must be an integer of at least 2 for a covariance, got {n}")
        n = None if n is None else int(n)
        names = {"backbone": backbone, "protocol": protocol, "resize": resize, "precision": precision}
        stats = cls(mean.shape[0], **names)
        cov = (cov + cov.mT) / 2
        stats._replace(n, None, mean, cov if n is None else cov * (n - 1))
        if factor is not None:
            rows = as_float64(factor)
            check_factor(rows, cov, n)
            if rows.shape[0] <= rows.shape[1]:
                stats._replace(n, [rows + mean])
        if root is not None:
            stats._root = as_float64(root)
            check_root(stats._root, cov)
        return stats

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> FeatureStats:
        """Read an npz file of :meth:`save`, or of another tool; see :mod:`fastgan.metrics.stats_file` for its keys.

        Files without ``n`` give statistics with ``n = None``. Nothing is unpickled.

        Raises:
            InputError: there is no such file, it is damaged or holds pickled objects, or its arrays do not fit
                together.
        """
        return cls.from_arrays(path, read_npz(Path(path))).to(device)

    @classmethod
    def from_arrays(cls, path: str | Path, arrays: dict[str, np.ndarray]) -> FeatureStats:
        """Statistics from the arrays of the npz file ``path``. Raises ``InputError`` naming the file."""
        mu, sigma = (arrays[key] for key in moment_keys(path, arrays))
        try:
            n = scalar(arrays, "n", int)
            texts = {key: scalar(arrays, key, str) for key in _TEXTS}
            dtype = texts.pop("dtype")
            texts["protocol"] = texts["protocol"] or protocol_of_old_file(texts["backbone"], texts["resize"])
            stats = cls.from_moments(mu, sigma, n=n, factor=arrays.get("factor"), root=arrays.get("root"), **texts)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}") from error
        stats.dtype = dtype
        return stats

    def save(self, path: str | Path, *, root: bool = False) -> None:
        """Write an npz file that pytorch-fid and clean-fid read too, exactly at ``path``, whole or not at all.

        :mod:`fastgan.metrics.stats_file` lists its keys. ``root=True`` also writes :meth:`root` where the vectors
        themselves are not held: distances to the statistics read again then factor them no more. It doubles the file,
        by 32 MB at dim 2048.

        Raises:
            InputError: fewer than two vectors, a covariance with a clearly negative eigenvalue where its root is asked
                for, or the folder of ``path`` does not exist.
        """
        write_npz(path, self.to_arrays(root=root))

    def to_arrays(self, *, root: bool = False) -> dict[str, np.ndarray]:
        """The arrays of the file that :meth:`save` writes."""
        arrays: dict[str, np.ndarray] = {"mu": self.mean.cpu().numpy(), "sigma": self.cov.cpu().numpy()}
        if self._n is not None:
            arrays["n"] = np.array(self._n, dtype=np.int64)
        factor = self.factor
        if factor is not None:
            arrays["factor"] = factor.cpu().numpy()
        elif root:
            arrays["root"] = self.root().cpu().numpy()
        texts = {key: getattr(self, key) for key in _TEXTS} | {"fastgan_version": fastgan.__version__}
        return arrays | {key: np.array(text) for key, text in texts.items() if text is not None}

    @property
    def n(self) -> int | None:
        """Number of vectors seen; None for statistics from a file that does not tell."""
        return self._n

    @property
    def dim(self) -> int | None:
        """Features per vector; None before the first batch."""
        return self._dim

    @property
    def device(self) -> torch.device | None:
        """Device of the statistics; None before the first vector."""
        if self._rows:
            return self._rows[0].device
        return None if self._mean is None else self._mean.device

    @property
    def mean(self) -> Tensor:
        """(dim,) float64. Raises ``InputError`` before the first vector."""
        self._require(1, "mean")
        if self._rows is not None:
            return centered(torch.cat(self._rows))[0]
        assert self._mean is not None
        return self._mean.clone()

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (divided by n - 1), (dim, dim) float64. Raises ``InputError`` under two vectors."""
        self._require(2, "cov")
        _, scatter = self.moments()
        return scatter.clone() if self._n is None else scatter / (self._n - 1)

    @property
    def holds_vectors(self) -> bool:
        """True while n <= dim: the vectors themselves are held, and :attr:`factor` exists."""
        return bool(self._rows)

    @property
    def factor(self) -> Tensor | None:
        """Centered features X (n, dim) with ``X^T X / (n - 1) = cov``, float64, while n <= dim; None after that."""
        return centered(torch.cat(self._rows))[1] if self._rows else None

    @property
    def known_root(self) -> Tensor | None:
        """The root that :meth:`root` returns without computing it: None for n > dim before its first call."""
        return self.root() if self._rows and self._n != 1 else self._root

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

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (dim,) and sum of centered outer products (dim, dim), float64, not to be changed in place; zeros before
        any vector. If ``n`` is unknown, the covariance stands in for the sum."""
        if self._rows:
            return moments_of(torch.cat(self._rows))
        if self._mean is not None and self._scatter is not None:
            return self._mean, self._scatter
        dim = self._dim or 0
        return torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor | npt.ArrayLike) -> FeatureStats:
        """Add a batch of features (batch, dim) of any floating dtype; returns self.

        Raises:
            ValueError: ``features`` has another rank or dtype, another ``dim`` than before, or a value that is not
                finite (the row is named), or these statistics come from a file without ``n``.
        """
        batch = as_features("features", features)
        check_tensor("features", batch, ndim=2)
        n = self._known_n("update")
        self._check_dim(batch.shape[1], "features")
        finite = torch.isfinite(batch).all(dim=1)
        if not finite.all():
            row = int(torch.nonzero(~finite)[0])
            raise InputError(
                f"features must be finite: row {row} of this batch (vector {n + row} in all) has NaN or infinity"
            )
        if batch.shape[0] == 0:
            return self
        self.dtype = str(batch.dtype).removeprefix("torch.") if self.dtype is None else self.dtype
        self._dim = batch.shape[1]
        device = self.device or float64_device(batch.device)
        # a copy even of float64 input: the caller may write into its buffer again
        self._join_rows(n, [batch.to(device=device, dtype=torch.float64, copy=True)])
        return self

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Add all that ``other`` has seen, as if its vectors had come here; ``other`` stays as it is. Returns self.

        Raises:
            ValueError: the dimensions, backbones or protocols differ, or one side comes from a file without
                ``n``.
        """
        n, added = self._known_n("merge"), other._known_n("merge")
        if other._dim is not None:
            self._check_dim(other._dim, "other")
        check_comparable(self, other)
        self.backbone = self.backbone or other.backbone
        self.protocol = self.protocol or other.protocol
        self.resize = self.resize or other.resize
        self.dtype = self.dtype or other.dtype
        self.precision = joint_precision([self.precision, other.precision])
        if not added:
            return self
        self._dim = other._dim
        device = self.device or other.device
        if other._rows is not None:
            self._join_rows(n, [rows.to(device) for rows in other._rows])
        else:
            mean, scatter = other.moments()
            self._join_moments(n, added, mean.to(device), scatter.to(device))
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> FeatureStats:
        """Join the statistics of all processes of ``group`` (None: the default one); every process then has them all.

        A collective call: every process must make it, also one that has seen no vectors. It sends one (dim, dim) sum,
        or the vectors themselves while there are at most dim of them in all. Returns self.

        Raises:
            ValueError: the processes' dimensions, backbones or protocols differ, or an ``n`` is unknown.
            RuntimeError: torch.distributed is not initialized.
        """
        header = {key: getattr(self, key) for key in ("n", "dim", *_TEXTS)} | {"held": self._rows is not None}
        headers = gather_objects(header, group)
        for rank, header in enumerate(headers):
            if header["n"] is None:
                raise InputError(f"cannot all_reduce statistics whose n is unknown, as they are in process {rank}")
        for key in _IDENTITY:
            known = {header[key] for header in headers if header[key] is not None}
            if len(known) > 1:
                raise InputError(f"the processes' statistics differ in {key}: {', '.join(sorted(map(str, known)))}")
        counts = [header["n"] for header in headers]
        total = sum(counts)
        if not total:
            return self
        self._dim, self.backbone, self.protocol, self.resize, self.dtype = (
            next((header[key] for header in headers if header[key] is not None), None) for key in (*_IDENTITY, "dtype")
        )
        self.precision = joint_precision(header["precision"] for header in headers)
        assert self._dim is not None
        device = collective_device(group)
        home = self.device or device
        if total <= self._dim and all(header["held"] for header in headers):
            rows = torch.cat(self._rows) if self._rows else torch.zeros(0, self._dim, dtype=torch.float64)
            self._replace(total, [torch.cat(gather_parts(rows, counts, group)).to(home)])
            return self
        mean, scatter = self.moments()
        mean, scatter = mean.to(device), scatter.to(device, copy=True)
        joint_mean, seen = torch.zeros_like(mean), 0
        for count, (part,) in zip(counts, gather_parts(mean[None], [1] * len(counts), group), strict=True):
            if count:
                seen += count
                joint_mean = joint_mean + (part - joint_mean) * (count / seen)
        delta = mean - joint_mean
        scatter.addr_(delta, delta, alpha=counts[dist.get_rank(group)])
        dist.all_reduce(scatter, group=group)
        self._replace(total, None, joint_mean.to(home), scatter.to(home))
        return self

    def to(self, device: torch.device | str) -> FeatureStats:
        """Move everything to ``device``, in place; returns self."""
        if self._rows is not None:
            self._rows = [rows.to(device) for rows in self._rows]
        if self._mean is not None and self._scatter is not None:
            self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)
        self._root = None if self._root is None else self._root.to(device)
        return self

    def __repr__(self) -> str:
        return f"FeatureStats(n={self._n}, dim={self._dim}, backbone={self.backbone!r}, protocol={self.protocol!r})"

    def _replace(self, n: int | None, rows: list[Tensor] | None, *moments: Tensor) -> None:
        """Take ``n`` vectors, or the mean and scatter of so many, in the place of all seen before."""
        self._n, self._rows, self._root = n, rows, None
        self._mean, self._scatter = moments or (None, None)

    def _join_rows(self, n: int, rows: list[Tensor]) -> None:
        added = sum(len(batch) for batch in rows)
        if self._rows is not None and self._dim is not None and n + added <= self._dim:
            self._replace(n + added, self._rows + rows)
        else:
            self._join_moments(n, added, *moments_of(torch.cat(rows)))

    def _join_moments(self, n: int, added: int, mean: Tensor, scatter: Tensor) -> None:
        if n:
            mean, scatter = joined(n, *self.moments(), added, mean, scatter)
        self._replace(n + added, None, mean, scatter)

    def _require(self, least: int, what: str) -> None:
        if self._n is not None and self._n < least:
            raise InputError(f"{what} needs at least {least} feature vector{'s' * (least > 1)}, there are {self._n}")

    def _known_n(self, action: str) -> int:
        if self._n is None:
            raise InputError(
                f"cannot {action} statistics whose n is unknown (they come from a file with mu and sigma only)"
            )
        return self._n

    def _check_dim(self, dim: int, name: str) -> None:
        if dim < 1:
            raise InputError(f"{name} must have at least one feature per vector, got {dim}")
        if self._dim is not None and dim != self._dim:
            raise InputError(f"{name} must have {self._dim} features per vector, got {dim}")


def joint_precision(precisions: Iterable[str | None]) -> str | None:
    """The precision of statistics of these precisions joined, as far as they are known."""
    known = {precision for precision in precisions if precision is not None}
    return "mixed" if len(known) > 1 else next(iter(known), None)


def check_comparable(a: FeatureStats, b: FeatureStats) -> None:
    """Raise ``InputError`` unless ``a`` and ``b`` agree in dim, backbone and protocol, as far as each is known."""
    for what in _IDENTITY:
        left, right = getattr(a, what), getattr(b, what)
        if left is not None and right is not None and left != right:
            raise InputError(f"the two statistics differ in {what}: {left} and {right}")
