"""Base of the torchmetrics metrics: the feature network, its device and mode, and states shared by processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from fastgan._checks import InputError
from fastgan.distributed import collective_device, gather_objects
from fastgan.metrics.backbones import Backbone, load_backbone
from fastgan.metrics.backbones.inception_network import DIMS
from fastgan.metrics.moments import as_features, float64_device
from fastgan.metrics.protocols import get_protocol
from fastgan.metrics.stats import FeatureStats

SIDES = ("real", "fake")


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


def is_real(real: Any, reference: Any) -> bool:
    """Return ``real``. Raises ``InputError`` for what is no bool, or if the real side is known before."""
    value = real.item() if isinstance(real, Tensor) and real.numel() == 1 else real
    if isinstance(value, Tensor | str | float) or value not in (True, False):
        raise InputError(f"real must be a bool, got {real!r}")
    if value and reference is not None:
        raise InputError("real images must not be given: the metric was made with a reference")
    return bool(value)


class KeptFeatures(FeatureMetric):
    """Keeps the features of both sides."""

    plot_lower_bound = 0.0
    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(self, feature: int | str | nn.Module | Backbone = 2048, *args: Any, **kwargs: Any) -> None:
        super().__init__(feature, *args, **kwargs)
        for side in SIDES:
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images (n, c, h, w), real or generated."""
        side = "real" if is_real(real, self._reference) else "fake"
        getattr(self, f"{side}_features").append(self.extract(imgs))

    def _both(self) -> tuple[Tensor, Tensor]:
        """Features of the real and the fake images. Raises ``TooFewImages`` where there are none."""
        sides = []
        for side in SIDES:
            rows = getattr(self, f"{side}_features")
            if side == "real" and self._reference is not None:
                rows = self._reference
            found = dim_zero_cat(rows) if len(rows) else torch.zeros(0, self.num_features or 1)
            if not len(found):
                raise TooFewImages(f"there are no {side} images yet")
            sides.append(found)
        return sides[0], sides[1]


def _home(tensor: Tensor, device: torch.device) -> torch.device:
    return float64_device(device) if tensor.dtype == torch.float64 else device
