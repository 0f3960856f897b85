"""Statistics of images that several processes share, on any backend of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan._checks import InputError
from fastgan.distributed import collective_device, gather_objects, gather_parts

if TYPE_CHECKING:
    from fastgan.metrics.stats import FeatureStats


def all_reduce_stats(stats: FeatureStats, group: dist.ProcessGroup | None = None) -> None:
    """Make ``stats`` of every process of ``group`` those of all their vectors together; see
    :meth:`FeatureStats.all_reduce`."""
    from fastgan.metrics.stats import check_comparable

    headers = gather_objects(_header(stats), group)
    _check_headers(headers)
    total = _empty_like(headers)
    check_comparable(stats, total)
    if not total.n:
        return
    device = collective_device(group)
    home = stats.device or device
    if total.n <= (total.dim or 0):
        parts = gather_parts(stats.rows(), [header["n"] for header in headers], total.dim or 0, device, group)
        stats.replace_by_rows(torch.cat(parts).to(home), like=total)
        return
    n, mean, scatter = stats.moments(total.dim or 0, device)
    means = gather_parts(mean[None], [1] * len(headers), total.dim or 0, device, group)
    counts = [header["n"] for header in headers]
    joint_mean = _joint_mean(counts, means)
    delta = mean - joint_mean
    scatter.addr_(delta, delta, alpha=n)
    dist.all_reduce(scatter, group=group)
    stats.replace_by_moments(total.n, joint_mean.to(home), scatter.to(home), like=total)


def _header(stats: FeatureStats) -> dict[str, Any]:
    return {key: getattr(stats, key) for key in ("n", "dim", "backbone", "resize", "dtype", "precision")}


def _check_headers(headers: Sequence[dict[str, Any]]) -> None:
    for rank, header in enumerate(headers):
        if header["n"] is None:
            raise InputError(f"cannot all_reduce statistics whose n is unknown, as they are in process {rank}")
    for key in ("dim", "backbone", "resize"):
        known = {header[key] for header in headers if header[key] is not None}
        if len(known) > 1:
            raise InputError(f"the processes' statistics differ in {key}: {', '.join(sorted(map(str, known)))}")


def _empty_like(headers: Sequence[dict[str, Any]]) -> FeatureStats:
    """Statistics with the joint header and nothing in them; ``n`` is the joint number."""
    from fastgan.metrics.stats import FeatureStats, joint_precision

    known = {key: next((h[key] for h in headers if h[key] is not None), None) for key in headers[0]}
    total = FeatureStats(known["dim"], backbone=known["backbone"], resize=known["resize"])
    total.dtype, total.precision = known["dtype"], joint_precision(header["precision"] for header in headers)
    total._n = sum(header["n"] for header in headers)
    return total


def _joint_mean(counts: Sequence[int], means: Sequence[Tensor]) -> Tensor:
    mean, n = torch.zeros_like(means[0][0]), 0
    for count, part in zip(counts, means, strict=True):
        if count:
            n += count
            mean = mean + (part[0] - mean) * (count / n)
    return mean
