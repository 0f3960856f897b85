"""The metrics as ``torchmetrics.Metric``: update with images, compute, reset; in collections and across processes.

Signatures follow torchmetrics' own classes of these names; what differs: moments are merged in shifted float64,
features come from fastgan's backbones, and torch-fidelity is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from fastgan._checks import InputError
from fastgan.metrics._inception_score import inception_score
from fastgan.metrics.backbones import Backbone, load_backbone
from fastgan.metrics.frechet import frechet_distance, paired_frechet_distances
from fastgan.metrics.kid import kernel_distance
from fastgan.metrics.moments import joined
from fastgan.metrics.prdc import precision_recall
from fastgan.metrics.stats import FeatureStats

_SIDES = ("real", "fake")


class FeatureMetric(Metric):
    """What all share: images to features.

    Args:
        feature: Inception's features, 64, 192, 768, 2048 or ``"logits"``; a :class:`Backbone`; or a module, which gets
            the images as they come and returns (n, dim).
        reset_real_features: whether :meth:`reset` forgets the real images too.
        normalize: images are floating-point in [0, 1], in place of uint8 in [0, 255].
        input_img_size: (c, h, w) of the images that find out the dim of a ``feature`` that is a module without a
            ``num_features``.
        feature_extractor_weights_path: Inception's weights file.
        resize: method of :mod:`fastgan.data.resize`, for Inception and backbones.
        precision: of Inception's arithmetic.
        kwargs: torchmetrics' own.

    Raises:
        ValueError: an argument of another kind.
        InputError: Inception's weights are not at hand.
    """

    higher_is_better: bool | None = False
    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        feature: int | str | nn.Module | Backbone = 2048,
        reset_real_features: bool = True,
        normalize: bool = False,
        input_img_size: tuple[int, int, int] = (3, 299, 299),
        feature_extractor_weights_path: str | None = None,
        *,
        resize: str = "clean",
        precision: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("normalize", normalize), ("reset_real_features", reset_real_features)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be a bool, got {value!r}")
        self.reset_real_features = reset_real_features
        self.normalize = normalize
        self.resize = resize
        if isinstance(feature, nn.Module):
            self.extractor: nn.Module | Backbone = feature.eval()
        elif isinstance(feature, Backbone):
            self.extractor = feature
        elif isinstance(feature, bool) or not isinstance(feature, int | str):
            raise ValueError(f"feature must be an int, 'logits', a module or a Backbone, got {feature!r}")
        else:
            path = feature_extractor_weights_path
            self.extractor = load_backbone("inception", weights=path, dims=feature, precision=precision)

        if isinstance(self.extractor, Backbone):
            if self.extractor.dim is None:
                raise ValueError(f"backbone {self.extractor.name} must be made with its dim")
            self.num_features = self.extractor.dim
        elif isinstance(found := getattr(self.extractor, "num_features", None), int):
            self.num_features = found
        else:
            images = torch.zeros(1, *input_img_size, dtype=torch.float32 if normalize else torch.uint8)
            self.num_features = self.extract(images).shape[1]

    def extract(self, imgs: Tensor) -> Tensor:
        """Features (n, dim) of images (n, c, h, w).

        Raises:
            ValueError: for Inception and backbones, images of another dtype than ``normalize`` says or out of range.
        """
        if isinstance(self.extractor, Backbone):
            if imgs.is_floating_point() != self.normalize:
                wanted = "floating-point in [0, 1]" if self.normalize else "uint8 in [0, 255]"
                raise ValueError(f"imgs must be {wanted} with normalize={self.normalize}, got {imgs.dtype}")
            return self.extractor(imgs, resize=self.resize).to(self.device)
        with torch.no_grad():
            features = self.extractor(imgs)
        if features.ndim != 2 or len(features) != len(imgs):
            raise ValueError(f"feature must return (n, dim) for {len(imgs)} images, got {tuple(features.shape)}")
        return features

    def reset(self) -> None:
        """Forget the images; the real ones only with ``reset_real_features``."""
        names = [name for name in self._defaults if name.startswith("real")]
        kept = {}
        if not self.reset_real_features:  # torchmetrics empties lists in place
            values = {name: getattr(self, name) for name in names}
            kept = {name: list(value) if isinstance(value, list) else value for name, value in values.items()}
        super().reset()
        for name, value in kept.items():
            setattr(self, name, value)


class FrechetInceptionDistance(FeatureMetric):
    """The Frechet distance of the real and the fake images; the FID for ``feature=2048``. Lower is better.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.

    Each side is one float64 tensor (dim + 1, dim + 1), which torchmetrics gathers from all processes: the number of
    vectors in the corner, the mean in the rest of the first row, and the sum of centred outer products below it.
    """

    plot_lower_bound = 0.0
    real: Tensor
    fake: Tensor

    def __init__(self, feature: int | str | nn.Module | Backbone = 2048, *args: Any, **kwargs: Any) -> None:
        super().__init__(feature, *args, **kwargs)
        size = self.num_features + 1
        for side in _SIDES:
            self.add_state(side, torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images (n, c, h, w), real or generated."""
        side, features = "real" if real else "fake", self.extract(imgs)
        stats = FeatureStats(features.shape[1]).update(features)
        added = _packed(stats.n or 0, *stats.moments()).to(self.device)
        setattr(self, side, merge_moments([getattr(self, side), added]))

    def compute(self) -> Tensor:
        """The distance, float64. Raises ``InputError`` where a side has fewer than 2 images."""
        stats = []
        for side in _SIDES:
            count, mean, scatter = _unpacked(getattr(self, side))
            n = int(count.item())
            if n < 2:
                raise InputError(f"at least 2 {side} images are needed for a Frechet distance, there are {n}")
            stats.append(FeatureStats.from_moments(mean, scatter / (n - 1), n=n))
        return torch.tensor(frechet_distance(*stats), dtype=torch.float64, device=self.device)


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


class _KeptFeatures(FeatureMetric):
    """Keeps the features of both sides."""

    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(self, feature: int | str | nn.Module | Backbone = 2048, *args: Any, **kwargs: Any) -> None:
        super().__init__(feature, *args, **kwargs)
        for side in _SIDES:
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images (n, c, h, w), real or generated."""
        getattr(self, f"{'real' if real else 'fake'}_features").append(self.extract(imgs))

    def _both(self) -> tuple[Tensor, Tensor]:
        for side in _SIDES:
            if len(getattr(self, f"{side}_features")) == 0:
                raise InputError(f"there are no {side} images yet")
        return dim_zero_cat(self.real_features), dim_zero_cat(self.fake_features)


class KernelInceptionDistance(_KeptFeatures):
    """The kernel distance over random subsets; the KID for ``feature=2048``. Lower is better. Keeps all features.

    Args:
        feature: as in :class:`FeatureMetric`.
        subsets, subset_size, degree, gamma, coef, seed: as in :func:`fastgan.metrics.kernel_distance`.
        args, kwargs: as in :class:`FeatureMetric`.
    """

    def __init__(
        self,
        feature: int | str | nn.Module | Backbone = 2048,
        subsets: int = 100,
        subset_size: int = 1000,
        degree: int = 3,
        gamma: float | None = None,
        coef: float = 1.0,
        *args: Any,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature, *args, **kwargs)
        self._options: dict[str, Any] = {"subsets": subsets, "subset_size": subset_size, "seed": seed}
        self._options |= {"degree": degree, "gamma": gamma, "coef": coef}

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the subsets."""
        result = kernel_distance(*self._both(), **self._options)
        return torch.tensor(result.mean), torch.tensor(result.std)


class PrecisionRecall(_KeptFeatures):
    """Precision, recall, density and coverage. Higher is better. Keeps all features.

    Args:
        feature: as in :class:`FeatureMetric`.
        k: the neighbour that a ball reaches to.
        args, kwargs: as in :class:`FeatureMetric`.
    """

    higher_is_better = True

    def __init__(self, feature: int | str | nn.Module | Backbone = 2048, k: int = 5, *args: Any, **kwargs: Any) -> None:
        super().__init__(feature, *args, **kwargs)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``density`` and ``coverage``."""
        result = precision_recall(*self._both(), k=self.k)
        return {key: torch.tensor(getattr(result, key)) for key in ("precision", "recall", "density", "coverage")}


class InceptionScore(FeatureMetric):
    """The inception score, at least 1. Higher is better. Keeps all class scores.

    Args:
        feature: a module that returns class scores, a :class:`Backbone` with a head, or ``"logits_unbiased"``, which is
            Inception's scores without their bias.
        normalize: as in :class:`FeatureMetric`.
        splits, seed: as in :func:`fastgan.metrics.inception_score`.
        kwargs: as in :class:`FeatureMetric`.
    """

    higher_is_better = True
    logits: list[Tensor]

    def __init__(
        self,
        feature: str | nn.Module | Backbone = "logits_unbiased",
        normalize: bool = False,
        splits: int = 10,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(2048 if feature == "logits_unbiased" else feature, normalize=normalize, **kwargs)
        self.splits = splits
        self.seed = seed
        self.add_state("logits", [], dist_reduce_fx="cat")

    def update(self, imgs: Tensor) -> None:
        """Add images (n, c, h, w)."""
        features = self.extract(imgs)
        head = self.extractor.head if isinstance(self.extractor, Backbone) else None
        self.logits.append(features if head is None else head(features))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the splits."""
        if len(self.logits) == 0:
            raise InputError("there are no images yet")
        result = inception_score(dim_zero_cat(self.logits), splits=self.splits, seed=self.seed)
        return torch.tensor(result.mean), torch.tensor(result.std)


class ClassFrechetDistance(_KeptFeatures):
    """The Frechet distance within each class. Lower is better. Keeps all features.

    Args:
        num_classes: labels are in [0, num_classes).
        feature, args, kwargs: as in :class:`FeatureMetric`.
    """

    real_labels: list[Tensor]
    fake_labels: list[Tensor]

    def __init__(
        self, num_classes: int, feature: int | str | nn.Module | Backbone = 2048, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(feature, *args, **kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        for side in _SIDES:
            self.add_state(f"{side}_labels", [], dist_reduce_fx="cat")

    def update(self, imgs: Tensor, labels: Tensor, real: bool) -> None:  # type: ignore[override]
        """Add images (n, c, h, w) with their classes (n,), int64, real or generated.

        Raises:
            InputError: the labels are no integers in [0, num_classes), or not one for each image.
        """
        if labels.ndim != 1 or len(labels) != len(imgs) or labels.is_floating_point():
            raise InputError(f"labels must be {len(imgs)} integers, got {labels.dtype} of {tuple(labels.shape)}")
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise InputError(f"labels must be in [0, {self.num_classes}), got {labels.min()} to {labels.max()}")
        super().update(imgs, real)
        getattr(self, f"{'real' if real else 'fake'}_labels").append(labels.long().to(self.device))

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
        return values
