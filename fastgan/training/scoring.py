"""Frechet distances of a generator during training, at several numbers of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgan.data import LabeledImages, as_float, sketches_of
from fastgan.metrics import Backbone, FeatureStats, default_backbone, frechet_distance, load_backbone
from fastgan.metrics.features import empty_stats
from fastgan.metrics.protocols import choose_protocol
from fastgan.recipes import Recipe
from fastgan.training.pictures import to_pixels
from fastgan.training.sampling import sample

SEED = 1
_BATCH = 50


@dataclass(frozen=True)
class Score:
    """Distances after ``step`` steps, by the number of images in each of the two sets."""

    step: int
    distances: dict[int, float]

    @property
    def decisive(self) -> float:
        """Distance at the most images."""
        return self.distances[max(self.distances)]


class Scorer:
    """Distances of generated images to a fixed random choice of held-out real ones.

    Args:
        held_out: real images that are not trained on.
        train: training images, whose distances to ``held_out`` are the floors.
        sizes: numbers of images per set. Sizes above that of ``held_out`` are left out; if none is left, all held-out
            images are used.
        backbone: a name of :mod:`fastgan.metrics`, or "auto".
        device: where the features are computed.
        sketches: as in :class:`fastgan.data.DeviceLoader`, for a generator that starts from them.

    Attributes:
        label: "FID" if the features are Inception's, else "Frechet distance (<backbone>)".
        protocol: preprocessing of the images, the default of ``fastgan evaluate``.
        floors: distance of real training images to the held-out ones at each size.
    """

    def __init__(
        self,
        held_out: LabeledImages,
        train: LabeledImages,
        sizes: Sequence[int],
        *,
        backbone: str = "auto",
        device: torch.device | str = "cpu",
        sketches: str = "none",
    ) -> None:
        if len(held_out) < 2:
            raise ValueError(f"held_out must hold at least 2 images to score against, got {len(held_out)}")
        self.sizes = sorted({size for size in sizes if size <= len(held_out)} or {len(held_out)})
        n = max(self.sizes)
        self.reference = random_part(held_out, n)
        self.sketches = None if sketches == "none" else sketches_of(self.reference, sketches)
        self.backbone: Backbone = load_backbone(default_backbone() if backbone == "auto" else backbone, device=device)
        self.protocol = choose_protocol(self.backbone.name, None)
        self.label = "FID" if self.backbone.name == "inception" else f"Frechet distance ({self.backbone.name})"
        self._references = self._stats(self._features(self.reference.images))
        self.floors = self._distances(self._features(random_part(train, n).images))

    def score(self, generator: nn.Module, step: int) -> Score:
        """Return the distances of as many generated images, with the classes and sketches of the real ones."""
        sketches = self.sketches if getattr(generator, "sketch_channels", 0) else None
        images = sample(generator, self.reference.labels.cpu(), seed=SEED, sketches=sketches)
        return Score(step, self._distances(self._features(images)))

    def _features(self, images: Tensor) -> Tensor:
        batches = (to_pixels(as_float(batch)) for batch in images.split(_BATCH))  # the 8 bits that files would have
        return torch.cat([self.backbone(pixels) for pixels in batches])

    def _stats(self, features: Tensor) -> dict[int, FeatureStats]:
        return {n: empty_stats(self.backbone, self.protocol).update(features[:n]) for n in self.sizes}

    def _distances(self, features: Tensor) -> dict[int, float]:
        stats = self._stats(features)
        return {n: frechet_distance(stats[n], self._references[n]) for n in self.sizes if n <= len(features)}


def score_backbone(recipe: Recipe) -> str:
    """Return the name of the network that scores a run, in its log and in ``fastgan evaluate RUN``.

    "auto" is Inception if its weights are installed and the data is not digits, else EfficientNet-Lite0.
    """
    if recipe.log.backbone != "auto":
        return recipe.log.backbone
    return "efficientnet_lite0" if recipe.data.source == "digits" else default_backbone()


def random_part(data: LabeledImages, n: int) -> LabeledImages:
    """Return up to ``n`` randomly chosen images, the same at each call."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(SEED))
    return data.subset(order[:n].to(data.labels.device))
