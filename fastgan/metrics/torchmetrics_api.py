"""The metrics as ``torchmetrics.Metric``: update with images, compute, reset; in collections and across processes.

Classes, arguments and their positions, and the errors' types and first words are those of ``torchmetrics.image``; the
default protocol is ``"torchmetrics"``, so that another import changes no number. What differs: moments are merged in
shifted float64, the network follows the metric to its device and nothing else reaches it, no warning says that features
are kept, and torch-fidelity is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from fastgan._checks import InputError, check_count, check_seed
from fastgan.distributed import collective_device, gather_objects
from fastgan.metrics._inception_score import inception_score
from fastgan.metrics.backbones import Backbone, load_backbone
from fastgan.metrics.backbones.inception_network import DIMS
from fastgan.metrics.diversity import mifid
from fastgan.metrics.features import empty_stats
from fastgan.metrics.frechet import frechet_distance, paired_frechet_distances
from fastgan.metrics.kid import check_kernel, kernel_distance
from fastgan.metrics.moments import as_features, float64_device, joined
from fastgan.metrics.prdc import precision_recall
from fastgan.metrics.protocols import get_protocol
from fastgan.metrics.stats import FeatureStats, check_comparable

_SIDES = ("real", "fake")


class TooFewImages(InputError, RuntimeError):
    """A metric was asked for before it had enough images; a ``RuntimeError`` as in torchmetrics."""


class ArgumentKindError(InputError, TypeError):
    """An argument of another kind than allowed; a ``TypeError`` as in torchmetrics."""


class FeatureMetric(Metric):
    """Images to features: what all classes here share.

    Args:
        feature: Inception's features, 64, 192, 768, 2048 or ``"logits_unbiased"``; a :class:`Backbone`; or a module,
            which gets the images as they come and returns (n, dim). It stays in eval mode.
        reset_real_features: whether :meth:`reset` forgets the real images too.
        normalize: images are floating-point in [0, 1], in place of uint8 in [0, 255].
        input_img_size: (c, h, w) of the image by which :class:`FrechetInceptionDistance` finds out the dim of a
            ``feature`` that is a module without ``num_features``.
        feature_extractor_weights_path: Inception's weights file.
        antialias: resize with antialiasing; False is the resizing of the original FID (``legacy_tensorflow``).
        protocol: a name of :mod:`fastgan.metrics.protocols`, for Inception and backbones.
        resize: a method of :mod:`fastgan.data.resize` in place of the protocol's.
        precision: of Inception's arithmetic.
        reference: the real side, known before: :class:`FeatureStats` (for Frechet distances) or features (n, dim).
            Real images are then refused.
        sync_timeout: seconds that :meth:`compute` waits for the other processes, which must all call it, before it
            raises ``RuntimeError``.
        kwargs: torchmetrics' own.

    Raises:
        ValueError, TypeError: an argument of another kind.
        InputError: Inception's weights are not at hand.
    """

    higher_is_better: bool | None = False
    is_differentiable = False
    full_state_update = False
    feature_network = "extractor"  # what torchmetrics' FeatureShare shares
    needs_dim = False  # before the first image
    reference_kinds = "features (n, dim)"
    _network: nn.Module

    def __init__(
        self,
        feature: int | str | nn.Module | Backbone = 2048,
        reset_real_features: bool = True,
        normalize: bool = False,
        input_img_size: tuple[int, int, int] = (3, 299, 299),
        feature_extractor_weights_path: str | None = None,
        antialias: bool = True,
        *,
        protocol: str = "torchmetrics",
        resize: str | None = None,
        precision: str = "auto",
        reference: FeatureStats | Tensor | Any = None,
        sync_timeout: float = 1800.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        flags = {"normalize": normalize, "reset_real_features": reset_real_features, "antialias": antialias}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be a bool, got {value!r}")
        self.reset_real_features = reset_real_features
        self.normalize = normalize
        if isinstance(sync_timeout, bool) or not isinstance(sync_timeout, int | float) or not sync_timeout > 0:
            raise ValueError(f"sync_timeout must be a positive number of seconds, got {sync_timeout!r}")
        self.sync_timeout = sync_timeout
        self.protocol = get_protocol(protocol, resize or (None if antialias else "legacy_tensorflow"))
        extractor: nn.Module
        if isinstance(feature, nn.Module):
            extractor = feature.eval()
        elif isinstance(feature, bool) or not isinstance(feature, int | str):
            raise ArgumentKindError(
                f"Got unknown input to argument `feature`: it must be an int, 'logits_unbiased', a module or a "
                f"Backbone, got {feature!r}"
            )
        elif isinstance(feature, int) and feature not in DIMS:
            raise InputError(f"Integer input to argument `feature` must be one of {list(DIMS)}, but got {feature}")
        else:
            path = feature_extractor_weights_path
            extractor = load_backbone("inception", weights=path, dims=feature, precision=precision)
        self._is_backbone = isinstance(extractor, Backbone)
        self._head = extractor.head if isinstance(extractor, Backbone) else None
        self.extractor = extractor
        self.__dict__["_network"] = (
            extractor  # FeatureShare hides the module, which must follow the metric all the same
        )
        self.num_features = self._number_of_features(input_img_size)
        self._reference = None if reference is None else self._checked_reference(reference)

    @property
    def inception(self) -> nn.Module:
        """The network, by torchmetrics' name for it."""
        return self._network

    def _number_of_features(self, input_img_size: tuple[int, int, int]) -> int | None:
        extractor = self.extractor
        found = extractor.dim if isinstance(extractor, Backbone) else getattr(extractor, "num_features", None)
        if isinstance(extractor, Backbone) and found is None:
            raise ValueError(f"backbone {extractor.name} must be made with its dim")
        if isinstance(found, Tensor):
            found = int(found.item())
        if found is None and not self.needs_dim:
            return None
        if found is None:
            size = input_img_size
            # vectors (c,) too, for an extractor that takes them
            if not isinstance(size, Sequence) or not size or not all(isinstance(n, int) and n > 0 for n in size):
                raise ValueError(f"input_img_size must be (c, h, w), got {size!r}")
            images = torch.zeros(1, *input_img_size, dtype=torch.float32 if self.normalize else torch.uint8)
            found = self.extract(images.to(self.device)).shape[1]
        if not isinstance(found, int):
            raise ArgumentKindError(f"feature.num_features must be an int or a tensor, got {found!r}")
        return found

    def _checked_reference(self, reference: Any) -> Any:
        """Features (n, dim). Raises ``InputError`` unless they fit the network."""
        if isinstance(reference, FeatureStats):
            raise InputError(f"reference must be {self.reference_kinds}, got statistics")
        features = as_features("reference", reference)
        dim = self.num_features or "dim"
        if features.ndim != 2 or dim not in ("dim", features.shape[1]):
            raise InputError(f"reference must have shape (n, {dim}), got {tuple(features.shape)}")
        return features

    def extract(self, imgs: Tensor) -> Tensor:
        """Features (n, dim), on the metric's device, of images (n, c, h, w).

        Raises:
            ValueError: for Inception and backbones, images of another dtype than ``normalize`` says or out of range.
        """
        if not isinstance(imgs, Tensor):
            raise ArgumentKindError(f"imgs must be a tensor, got {type(imgs).__name__}")
        if self._is_backbone:
            if imgs.is_floating_point() != self.normalize:
                wanted = "floating-point values in [0, 1]" if self.normalize else "dtype=torch.uint8"
                with_option = f"with normalize={self.normalize}, got imgs of {imgs.dtype}"
                raise ValueError(f"Expecting image as torch.Tensor with {wanted} {with_option}")
            return self.extractor(imgs, protocol=self.protocol).to(self.device)
        if self._network.training:
            self._network.eval()
        if imgs.ndim == 0:
            raise ValueError("imgs must have a batch dimension, got one number")
        with torch.no_grad():
            features = self.extractor(imgs)
        if not isinstance(features, Tensor):
            raise ArgumentKindError(f"feature must return a tensor, got {type(features).__name__}")
        if features.ndim == 1 and len(imgs) == 1:
            features = features[None]
        if features.ndim != 2 or len(features) != len(imgs):
            raise ValueError(f"feature must return (n, dim) for {len(imgs)} images, got {tuple(features.shape)}")
        if len(features) and features.shape[1] != getattr(self, "num_features", None):
            if getattr(self, "num_features", None) is not None:
                raise InputError(
                    f"feature must return {self.num_features} features for each image, got {features.shape[1]}"
                )
            self.num_features = features.shape[1]
        return features.to(self.device)

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

    def train(self, mode: bool = True) -> FeatureMetric:
        """Set the metric's mode; the network stays in eval mode. Returns self."""
        super().train(mode)
        self._network.eval()
        return self

    def set_dtype(self, dst_type: str | torch.dtype) -> FeatureMetric:
        """Do nothing: moments are float64 and features keep the network's dtype in any case. Returns self."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move the states and the network; a module of the user's follows in dtype too, the states never do."""
        self._network._apply(fn)
        device = fn(torch.empty(0, device=self.device)).device
        if isinstance(self._reference, Tensor):
            self._reference = self._reference.to(device)
        return super()._apply(lambda tensor: tensor.to(_home(tensor, device)), *args, **kwargs)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states; a process without images takes part with empty tensors."""
        group = kwargs.get("process_group") or self.process_group
        here = torch.ones(1, dtype=torch.int64, device=collective_device(group))
        try:
            dist.all_reduce(here, group=group, async_op=True).wait(timedelta(seconds=self.sync_timeout))
        except RuntimeError as error:
            raise RuntimeError(
                f"compute() of {type(self).__name__} must be called in all processes of its group: after "
                f"{self.sync_timeout:g} seconds some had not ({str(error).splitlines()[0]})"
            ) from error
        lists = {name: getattr(self, name) for name in self._defaults if isinstance(getattr(self, name), list)}
        if lists:
            mine = {name: (rows[0].dtype, rows[0].shape[1:]) for name, rows in lists.items() if len(rows)}
            everyones = gather_objects(mine, group)
            for name, rows in lists.items():
                dtype, shape = next((found[name] for found in everyones if name in found), (torch.float32, (0,)))
                if not len(rows):
                    setattr(self, name, [torch.zeros(0, *shape, dtype=dtype, device=self.device)])
        super()._sync_dist(*args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several, by default :meth:`compute`'s, as torchmetrics does. Returns figure and axes."""
        val = self.compute() if val is None else val
        return self._plot(val[0] if isinstance(val, tuple) else val, ax)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=float64_device(self.device))


def _home(tensor: Tensor, device: torch.device) -> torch.device:
    return float64_device(device) if tensor.dtype == torch.float64 else device


class FrechetInceptionDistance(FeatureMetric):
    """The Frechet distance of the real and the fake images; the FID for ``feature=2048``. Lower is better.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.

    Each side is one float64 tensor (dim + 1, dim + 1), which torchmetrics gathers from all processes: the number of
    vectors in the corner, the mean in the rest of the first row, and the sum of centred outer products below it.

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
        for side in _SIDES:
            self.add_state(side, torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images (n, c, h, w), real or generated."""
        side, features = "real" if _is_real(real, self._reference) else "fake", self.extract(imgs)
        stats = FeatureStats(self.num_features).update(features)
        state = getattr(self, side)
        added = _packed(stats.n or 0, *stats.moments()).to(state.device)
        setattr(self, side, merge_moments([state, added]))

    def compute(self) -> Tensor:
        """The distance, float64. Raises ``TooFewImages`` where a side has fewer than 2 images."""
        stats = []
        for side in _SIDES:
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
        if side not in _SIDES or state not in ("sum", "cov_sum", "num_samples"):
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


def _is_real(real: Any, reference: Any) -> bool:
    """Return ``real``. Raises ``InputError`` for what is no bool, or if the real side is known before."""
    value = real.item() if isinstance(real, Tensor) and real.numel() == 1 else real
    if isinstance(value, Tensor | str | float) or value not in (True, False):
        raise InputError(f"real must be a bool, got {real!r}")
    if value and reference is not None:
        raise InputError("real images must not be given: the metric was made with a reference")
    return bool(value)


class _KeptFeatures(FeatureMetric):
    """Keeps the features of both sides."""

    plot_lower_bound = 0.0
    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(self, feature: int | str | nn.Module | Backbone = 2048, *args: Any, **kwargs: Any) -> None:
        super().__init__(feature, *args, **kwargs)
        for side in _SIDES:
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images (n, c, h, w), real or generated."""
        side = "real" if _is_real(real, self._reference) else "fake"
        getattr(self, f"{side}_features").append(self.extract(imgs))

    def _both(self) -> tuple[Tensor, Tensor]:
        """Features of the real and the fake images. Raises ``TooFewImages`` where there are none."""
        sides = []
        for side in _SIDES:
            rows = getattr(self, f"{side}_features")
            if side == "real" and self._reference is not None:
                rows = self._reference
            found = dim_zero_cat(rows) if len(rows) else torch.zeros(0, self.num_features or 1)
            if not len(found):
                raise TooFewImages(f"there are no {side} images yet")
            sides.append(found)
        return sides[0], sides[1]


class KernelInceptionDistance(_KeptFeatures):
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


class MemorizationInformedFrechetInceptionDistance(_KeptFeatures):
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


class PrecisionRecall(_KeptFeatures):
    """Precision, recall, density and coverage. Higher is better. Keeps all features.

    Args:
        feature: as in :class:`FeatureMetric`.
        k: the neighbour that a ball reaches to.
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


class ClassFrechetDistance(_KeptFeatures):
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
        for side in _SIDES:
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
        getattr(self, f"{'real' if _is_real(real, None) else 'fake'}_labels").append(labels.long().to(self.device))

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
