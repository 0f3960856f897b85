"""Frechet distances of a generator in training, at several numbers of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgan.data import LabelledImages, as_float, sketches_of
from fastgan.metrics import Backbone, FeatureStats, default_backbone, frechet_distance, load_backbone
from fastgan.training.sampling import sample

SEED = 1
_BATCH = 50


@dataclass(frozen=True)
class Score:
    """Distances after ``step`` steps, by the number of images on either side."""

    step: int
    distances: dict[int, float]

    @property
    def decisive(self) -> float:
        """That of the most images."""
        return self.distances[max(self.distances)]


class Scorer:
    """Distances of generated images to a fixed random choice of held-out real ones.

    Args:
        held_out: real images that are not trained on.
        train: the images trained on, whose own distances are the floors.
        sizes: numbers of images a side; those that ``held_out`` does not allow are left out, and where it allows none
            all of it is taken.
        backbone: a name of :mod:`fastgan.metrics`, or "auto".
        device: where the features are computed.
        sketches: as in :class:`fastgan.data.DeviceLoader`, for a generator that starts from them.

    Attributes:
        label: "FID" where the features are Inception's, else "Frechet distance (<backbone>)".
        floors: distance of real training images to the held-out ones at each size.
    """

    def __init__(
        self,
        held_out: LabelledImages,
        train: LabelledImages,
        sizes: Sequence[int],
        *,
        backbone: str = "auto",
        device: torch.device | str = "cpu",
        sketches: str = "none",
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if len(held_out) < 2:
            raise ValueError(f"held_out must hold at least 2 images to score against, got {len(held_out)}")
        self.sizes = sorted({size for size in sizes if size <= len(held_out)} or {len(held_out)})
        n = max(self.sizes)
        self.reference = held_out.subset(_chosen(len(held_out), n).to(held_out.labels.device))
        self.sketches = None if sketches == "none" else sketches_of(self.reference, sketches)
        self.backbone: Backbone = load_backbone(default_backbone() if backbone == "auto" else backbone, device=device)
        self.label = "FID" if self.backbone.name == "inception" else f"Frechet distance ({self.backbone.name})"
        self._references = self._stats(self._features(self.reference.images, on_batch))
        real = train.images[_chosen(len(train), n).to(train.labels.device)]
        self.floors = self._distances(self._features(real, on_batch))

    def score(self, generator: nn.Module, step: int) -> Score:
        """Distances of as many generated images, with the classes (and sketches) of the real ones."""
        sketches = self.sketches if getattr(generator, "sketch_channels", 0) else None
        images = sample(generator, self.reference.labels.cpu(), seed=SEED, sketches=sketches)
        return Score(step, self._distances(self._features(images)))

    def _features(self, images: Tensor, on_batch: Callable[[int], None] | None = None) -> Tensor:
        features = []
        for batch in images.split(_BATCH):
            pixels = as_float(batch).float().add(1).div(2).clamp(0, 1)
            features.append(self.backbone(pixels))
            if on_batch is not None:
                on_batch(len(batch))
        return torch.cat(features)

    def _stats(self, features: Tensor) -> dict[int, FeatureStats]:
        name = self.backbone.name
        return {n: FeatureStats(backbone=name, resize="clean").update(features[:n]) for n in self.sizes}

    def _distances(self, features: Tensor) -> dict[int, float]:
        stats = self._stats(features)
        return {n: frechet_distance(stats[n], self._references[n]) for n in self.sizes if n <= len(features)}


def _chosen(total: int, n: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(SEED))[:n]
