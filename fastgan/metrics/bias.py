"""How a Frechet distance falls with the number of images: the bias of a finite sample, as numbers and as a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan._files import atomic_path
from fastgan.metrics.feature_checks import check_features
from fastgan.metrics.frechet_many import frechet_distances
from fastgan.metrics.stats import FeatureStats

SMALLEST = 128


@dataclass(frozen=True)
class BiasCurve:
    """``distances[i]`` is that of the first ``sizes[i]`` images in a random order."""

    sizes: list[int]
    distances: list[float]


def bias_curve(features: Tensor, reference: FeatureStats, *, seed: int = 0) -> BiasCurve:
    """Frechet distances to ``reference`` of growing random parts of ``features`` (n, dim): 128, 256, 512, ... and n.

    Raises:
        InputError: fewer than 2 vectors, or of another dim than the reference's.
    """
    check_features("features", features, least=2)
    n = len(features)
    sizes = [size for size in (SMALLEST << i for i in range(n.bit_length())) if size < n] + [n]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(features.device)
    running, parts, start = FeatureStats(features.shape[1]), [], 0
    for size in sizes:
        running.update(features[order[start:size]])
        parts.append(FeatureStats(features.shape[1]).merge(running))
        start = size
    return BiasCurve(sizes, frechet_distances(reference, parts).tolist())


def check_plot_path(path: Path) -> None:
    """Raise ``InputError`` unless :func:`plot_bias` can write to ``path``: its folder is there, its format known."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InputError(f"cannot write {path}: its name must end in one of {', '.join(f'.{kind}' for kind in known)}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: its folder does not exist")


def plot_bias(
    curve: BiasCurve, path: Path, *, label: str, floor: float | None = None, limit: float | None = None
) -> None:
    """Draw the curve to an image file, the extension of whose name says which kind.

    Args:
        label: of the distance.
        floor: the distance of two splits of the real data, a horizontal line.
        limit: the distance extrapolated to infinitely many images, another.

    Raises:
        InputError: the file cannot be written, or matplotlib knows no such format.
    """
    from matplotlib.figure import Figure

    check_plot_path(path)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.sizes, curve.distances, "o-")
    for value, name in ((floor, "real against real"), (limit, "infinitely many images")):
        if value is not None:
            axes.axhline(value, linestyle="--", color="tab:grey")
            axes.annotate(name, (curve.sizes[0], value), va="bottom")
    axes.set(xscale="log", xlabel="images", ylabel=label, title="The same images, more and more of them")
    if min(curve.distances) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
