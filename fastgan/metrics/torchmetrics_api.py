"""The metrics as ``torchmetrics.Metric``: update with images, compute, reset; in collections and across processes.

Classes, arguments and their positions, and the errors' types and first words are those of ``torchmetrics.image``; the
default protocol is ``"torchmetrics"``, so that another import changes no number. What differs: moments are merged in
shifted float64, the network follows the metric to its device and nothing else reaches it, no warning says that features
are kept, and torch-fidelity is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities.data import dim_zero_cat

from fastgan._checks import InputError, check_count, check_seed
from fastgan.metrics._inception_score import inception_score
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.diversity import mifid
from fastgan.metrics.feature_metric import SIDES, FeatureMetric, KeptFeatures, TooFewImages, is_real
from fastgan.metrics.features import empty_stats
from fastgan.metrics.frechet import frechet_distance, paired_frechet_distances
from fastgan.metrics.kid import check_kernel, kernel_distance
from fastgan.metrics.moments import as_features, float64_device, joined
from fastgan.metrics.prdc import precision_recall
from fastgan.metrics.stats import FeatureStats, check_comparable


class FrechetInceptionDistance(FeatureMetric):
    """The Frechet distance of the real and the fake images; the FID for ``feature=2048``. Lower is better.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.

    Each side is one float64 tensor (dim + 1, dim + 1), which torchmetrics gathers from all processes: the number of
    vectors in the corner, the mean in the rest of the first row, and the sum of centered outer products below it.

    >>> from torch import nn
    >>> metric = FrechetInceptionDistance(nn.Flatten(), input_img_size=(3, 2, 2), normalize=True)
    >>> metric.update(torch.zeros(10, 3, 2, 2), real=True)
    >>> metric.update(torch.ones(10, 3, 2, 2), real=False)
    >>> metric.compute()  # twelve features, each off by one
    tensor(12., dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    reference_kinds = "FeatureStats or features (n, dim)"
    needs_dim = True
    num_features: int
    real: Tensor
    fake: Tensor

    def __init__(self, feature: int | str | nn.Module | Backbone = 2048, *args: Any, **kwargs: Any) -> None:
        super().__init__(feature, *args, **kwargs)
        size = self.num_features + 1
        for side in SIDES:
            self.add_state(side, torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images (n, c, h, w), real or generated."""
        side, features = "real" if is_real(real, self._reference) else "fake", self.extract(imgs)
        stats = FeatureStats(self.num_features).update(features)
        state = getattr(self, side)
        added = _packed(stats.n or 0, *stats.moments()).to(state.device)
        setattr(self, side, merge_moments([state, added]))

    def compute(self) -> Tensor:
        """The distance, float64. Raises ``TooFewImages`` where a side has fewer than 2 images."""
        stats = []
        for side in SIDES:
            if side == "real" and self._reference is not None:
                stats.append(self._reference)
                continue
            count, mean, scatter = _unpacked(getattr(self, side))
            n = int(count.item())
            if n < 2:
                raise TooFewImages(
                    f"More than one sample is required for both the real and fake distributed to compute FID: at least "
                    f"2 {side} images are needed, there are {n}"
                )
            stats.append(FeatureStats.from_moments(mean, scatter / (n - 1), n=n))
        return self._scalar(frechet_distance(*stats))

    def __getattr__(self, name: str) -> Any:
        """Compute torchmetrics' states ``{real,fake}_features_{sum,cov_sum,num_samples}`` from the moments."""
        side, _, state = name.partition("_features_")
        if side not in SIDES or state not in ("sum", "cov_sum", "num_samples"):
            return super().__getattr__(name)
        count, mean, scatter = _unpacked(getattr(self, side))
        if state == "num_samples":
            return count.long()
        return count * mean if state == "sum" else scatter + count * torch.outer(mean, mean)

    def _checked_reference(self, reference: Any) -> FeatureStats:
        if not isinstance(reference, FeatureStats):
            return FeatureStats(self.num_features).update(super()._checked_reference(reference))
        ours = FeatureStats(self.num_features)
        if isinstance(self._network, Backbone):
            ours = empty_stats(self._network, self.protocol)
        check_comparable(reference, ours)
        return reference


def merge_moments(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """The moments of all vectors behind ``parts``, packed as :class:`FrechetInceptionDistance` holds them."""
    merged, *others = parts
    for other in others:
        merged = _packed(merged[0, 0] + other[0, 0], *joined(*_unpacked(merged), *_unpacked(other)))
    return merged


def _packed(n: int | Tensor, mean: Tensor, scatter: Tensor) -> Tensor:
    packed = scatter.new_zeros(len(mean) + 1, len(mean) + 1)
    packed[0, 0], packed[0, 1:], packed[1:, 1:] = n, mean, scatter
    return packed


def _unpacked(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return moments[0, 0], moments[0, 1:], moments[1:, 1:]


class KernelInceptionDistance(KeptFeatures):
    """The kernel distance over random subsets; the KID for ``feature=2048``. Lower is better. Keeps all features.

    Args:
        feature: as in :class:`FeatureMetric`.
        subsets, subset_size, degree, gamma, coef, seed: as in :func:`fastgan.metrics.kernel_distance`; fewer than
            ``subset_size`` images on a side are an error, as in torchmetrics.
        args, kwargs: as in :class:`FeatureMetric`.

    Example:
        >>> metric = KernelInceptionDistance(nn.Flatten(), subset_size=10, subsets=2, normalize=True)
        >>> metric.update(torch.zeros(10, 3, 2, 2), real=True)
        >>> metric.update(torch.ones(10, 3, 2, 2), real=False)
        >>> mean, std = metric.compute()
    """

    plot_upper_bound = 1.0

    def __init__(
        self,
        feature: int | str | nn.Module | Backbone = 2048,
        subsets: int = 100,
        subset_size: int = 1000,
        degree: int = 3,
        gamma: float | None = None,
        coef: float = 1.0,
        reset_real_features: bool = True,
        normalize: bool = False,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_seed("seed", seed)
        try:
            check_kernel(subsets=subsets, subset_size=subset_size, degree=degree, gamma=gamma, coef=coef)
        except ValueError as error:
            name = str(error).split()[0]
            kind = {"gamma": "`None` or float", "coef": "float"}.get(name, "integer")
            raise InputError(f"Argument `{name}` expected to be {kind} larger than 0: {error}") from error
        super().__init__(feature, reset_real_features, normalize, **kwargs)
        self._options: dict[str, Any] = {"subsets": subsets, "subset_size": subset_size, "seed": seed}
        self._options |= {"degree": degree, "gamma": gamma, "coef": coef}

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation over the subsets, float64, as in torchmetrics."""
        real, fake = self._both()
        size, least = self._options["subset_size"], min(len(real), len(fake))
        if least < size:
            raise InputError(
                f"Argument `subset_size` should be smaller than the number of samples: it must be at most {least}, "
                f"got {size}"
            )
        result = kernel_distance(real, fake, **self._options)
        return self._scalar(result.mean), self._scalar(result.std)


class MemorizationInformedFrechetInceptionDistance(KeptFeatures):
    """The memorization-informed Frechet distance; the MiFID for ``feature=2048``. Lower is better. Keeps all features.

    Args:
        feature, reset_real_features, normalize, kwargs: as in :class:`FeatureMetric`.
        cosine_distance_eps: as in :func:`fastgan.metrics.mifid`.

    Example:
        >>> metric = MemorizationInformedFrechetInceptionDistance(nn.Flatten(), normalize=True)
        >>> metric.update(torch.rand(20, 3, 2, 2), real=True)
        >>> metric.update(torch.rand(20, 3, 2, 2), real=False)
        >>> value = metric.compute()
    """

    def __init__(
        self,
        feature: int | str | nn.Module | Backbone = 2048,
        reset_real_features: bool = True,
        normalize: bool = False,
        cosine_distance_eps: float = 0.1,
        **kwargs: Any,
    ) -> None:
        eps = cosine_distance_eps
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps <= 1:
            raise InputError(
                f"Argument `cosine_distance_eps` expected to be a float greater than 0 and at most 1, got {eps!r}"
            )
        super().__init__(feature, reset_real_features, normalize, **kwargs)
        self.cosine_distance_eps = cosine_distance_eps

    def compute(self) -> Tensor:
        """The distance, float64. Raises ``InputError`` where a side has fewer than 2 images."""
        return self._scalar(mifid(*self._both(), cosine_distance_eps=self.cosine_distance_eps))


class PrecisionRecall(KeptFeatures):
    """Precision, recall, density and coverage. Higher is better. Keeps all features.

    Args:
        feature: as in :class:`FeatureMetric`.
        k: the neighbor that a ball reaches to.
        args, kwargs: as in :class:`FeatureMetric`.

    Example:
        >>> metric = PrecisionRecall(nn.Flatten(), k=3, normalize=True)
        >>> metric.update(torch.rand(20, 3, 2, 2), real=True)
        >>> metric.update(torch.rand(20, 3, 2, 2), real=False)
        >>> sorted(metric.compute())
        ['coverage', 'density', 'precision', 'recall']
    """

    higher_is_better = True

    def __init__(self, feature: int | str | nn.Module | Backbone = 2048, k: int = 5, *args: Any, **kwargs: Any) -> None:
        check_count("k", k, 1)
        super().__init__(feature, *args, **kwargs)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``density`` and ``coverage``, float64."""
        result = precision_recall(*self._both(), k=self.k)
        return {key: self._scalar(getattr(result, key)) for key in ("precision", "recall", "density", "coverage")}


class InceptionScore(FeatureMetric):
    """The inception score, at least 1. Higher is better. Keeps all class scores.

    Args:
        feature: a module that returns class scores, a :class:`Backbone` with a head, ``"logits_unbiased"``, which is
            Inception's scores without their bias, or a number of Inception's features, taken for scores.
        splits, seed: as in :func:`fastgan.metrics.inception_score`.
        normalize: as in :class:`FeatureMetric`.
        kwargs: as in :class:`FeatureMetric`.

    Example:
        >>> logits = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> metric = InceptionScore(logits, splits=2, normalize=True, input_img_size=(3, 2, 2))
        >>> metric.update(torch.rand(20, 3, 2, 2))
        >>> mean, std = metric.compute()
    """

    higher_is_better = True
    plot_lower_bound = 1.0
    logits: list[Tensor]

    def __init__(
        self,
        feature: int | str | nn.Module | Backbone = "logits_unbiased",
        splits: int = 10,
        normalize: bool = False,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_count("splits", splits, 1)
        check_seed("seed", seed)
        as_scores = isinstance(feature, str)  # 2048 features, of which the head makes scores: FeatureShare shares them
        super().__init__(2048 if feature == "logits_unbiased" else feature, normalize=normalize, **kwargs)
        self._scores: Callable[[Tensor], Tensor] | None = (
            self._head if as_scores or isinstance(feature, Backbone) else None
        )
        self.splits = splits
        self.seed = seed
        self.add_state("logits", [], dist_reduce_fx="cat")

    def update(self, imgs: Tensor) -> None:
        """Add images (n, c, h, w)."""
        features = self.extract(imgs)
        self.logits.append(features if self._scores is None else self._scores(features).to(self.device))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the splits, float64; divided by their number less one, as in torchmetrics
        (:func:`fastgan.metrics.inception_score` divides by their number). 0 for one split."""
        rows = dim_zero_cat(self.logits) if len(self.logits) else torch.zeros(0, 1)
        if not len(rows):
            raise TooFewImages("there are no images yet")
        result = inception_score(rows, splits=self.splits, seed=self.seed)
        correction = (self.splits / max(self.splits - 1, 1)) ** 0.5
        return self._scalar(result.mean), self._scalar(result.std * correction)


class ClassFrechetDistance(KeptFeatures):
    """The Frechet distance within each class. Lower is better. Keeps all features.

    Args:
        num_classes: labels are in [0, num_classes).
        feature, args, kwargs: as in :class:`FeatureMetric`.

    Example:
        >>> metric = ClassFrechetDistance(2, nn.Flatten(), input_img_size=(3, 2, 2), normalize=True)
        >>> images, labels = torch.zeros(8, 3, 2, 2), torch.arange(8) % 2
        >>> metric.update(images, labels, real=True)
        >>> metric.update(images + labels.view(-1, 1, 1, 1), labels, real=False)
        >>> metric.compute()
        tensor([ 0., 12.], dtype=torch.float64)
    """

    real_labels: list[Tensor]
    fake_labels: list[Tensor]

    def __init__(
        self, num_classes: int, feature: int | str | nn.Module | Backbone = 2048, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer of at least 1, got {num_classes!r}")
        super().__init__(feature, *args, **kwargs)
        if self._reference is not None:
            raise ValueError("reference must be None: the classes of its rows are not known")
        self.num_classes = num_classes
        for side in SIDES:
            self.add_state(f"{side}_labels", [], dist_reduce_fx="cat")

    def update(self, imgs: Tensor, labels: Any, real: bool) -> None:  # type: ignore[override]
        """Add images (n, c, h, w) with their classes (n,), integers, real or generated.

        Raises:
            InputError: the labels are no integers in [0, num_classes), or not one for each image.
        """
        labels = as_features("labels", labels)
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.ndim != 1 or len(labels) != len(imgs) or not is_integer:
            raise InputError(f"labels must be {len(imgs)} integers, got {labels.dtype} of {tuple(labels.shape)}")
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise InputError(f"labels must be in [0, {self.num_classes}), got {labels.min()} to {labels.max()}")
        super().update(imgs, real)
        getattr(self, f"{'real' if is_real(real, None) else 'fake'}_labels").append(labels.long().to(self.device))

    def compute(self) -> Tensor:
        """The distances, (num_classes,) float64; NaN for a class with fewer than 2 images on a side."""
        features, labels = self._both(), (dim_zero_cat(self.real_labels), dim_zero_cat(self.fake_labels))
        values = torch.full((self.num_classes,), float("nan"), dtype=torch.float64)
        counts = [side.bincount(minlength=self.num_classes) for side in labels]
        classes = torch.nonzero(torch.minimum(*counts) >= 2).flatten().tolist()
        real, fake = (
            [FeatureStats(self.num_features).update(rows[side == c]) for c in classes]
            for rows, side in zip(features, labels, strict=True)
        )
        values[classes] = paired_frechet_distances(real, fake)
        return values.to(float64_device(self.device))
