"""Labelled image sets, their splits, and a loader that keeps them on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.checks import check_tensor


@dataclass(frozen=True)
class LabelledImages:
    """Images (n, channels, h, w) in [-1, 1] with labels (n,) int64 in [0, n_classes).

    Raises:
        ValueError: shapes, dtypes, or a label disagree with that.
    """

    images: Tensor
    labels: Tensor
    n_classes: int

    def __post_init__(self) -> None:
        check_tensor("images", self.images, ndim=4)
        check_tensor("labels", self.labels, ndim=1, dtypes=(torch.int64,))
        if len(self.images) != len(self.labels):
            raise ValueError(f"labels must have shape ({len(self.images)},) as images, got {tuple(self.labels.shape)}")
        if not len(self.labels):
            raise ValueError("images must hold at least one image, got none")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.n_classes:
            raise ValueError(f"labels must be in [0, {self.n_classes}), got {low} to {high}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> LabelledImages:
        """The same images on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index: Tensor) -> LabelledImages:
        """The images at ``index``, an int64 or bool tensor, in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])


def digits(resolution: int = 32, *, held_out: float = 1 / 3, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """The 1797 handwritten 8x8 grey digits inside scikit-learn's wheel, up-sampled; no download.

    They are the test part of Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998.

    Args:
        resolution: height and width to resize to, bicubically.
        held_out: the part of each class to hold out, in (0, 1).
        seed: of the split.

    Returns:
        The training and the held-out images, (n, 1, resolution, resolution) float32 in [-1, 1], ten classes.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: ``resolution`` or ``held_out`` is outside its range.
    """
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits data set comes with scikit-learn, which is not installed: pip install 'fastgan[demo]'"
        ) from error
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] / 16  # the wheel's range is 0 to 16
    if resolution != grey.shape[-1]:
        grey = F.interpolate(grey, size=(resolution, resolution), mode="bicubic", antialias=True)
    images = grey.clamp_(0, 1) * 2 - 1
    whole = LabelledImages(images, torch.from_numpy(bunch.target).long(), n_classes=10)
    return stratified_split(whole, held_out=held_out, seed=seed)


def stratified_split(data: LabelledImages, *, held_out: float, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """Split so that each class gives the same part, to the nearest image, to the second set.

    Each of the two sets keeps the order of ``data``; the same seed gives the same split on every device.

    Raises:
        ValueError: ``held_out`` is not in (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out}")
    rng = torch.Generator().manual_seed(seed)
    labels = data.labels.cpu()
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(data.n_classes):
        members = torch.nonzero(labels == label).squeeze(1)
        order = members[torch.randperm(len(members), generator=rng)]
        chosen[order[: round(held_out * len(members))]] = True
    chosen = chosen.to(data.labels.device)
    return data.subset(~chosen), data.subset(chosen)


class DeviceLoader:
    """Endless shuffled batches from a data set that lives on the device.

    Every epoch is a fresh permutation, an incomplete last batch is dropped. The order comes from a generator of its own
    on the CPU, so that it is the same on every device and :meth:`state_dict` restores it to the batch.

    Args:
        data: the images; batches are on their device.
        batch_size: images a batch, from 1 to ``len(data)``.
        seed: of the order.

    Raises:
        ValueError: ``batch_size`` is outside its range.
    """

    def __init__(self, data: LabelledImages, batch_size: int, *, seed: int = 0) -> None:
        if not 1 <= batch_size <= len(data):
            raise ValueError(f"batch_size must be from 1 to the number of images, {len(data)}, got {batch_size}")
        self.data = data
        self.batch_size = batch_size
        self._rng = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.next()

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch: images (batch_size, channels, h, w) and labels (batch_size,)."""
        if self._position + self.batch_size > len(self.data):
            self._begin_epoch()
        index = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return self.data.images[index], self.data.labels[index]

    def state_dict(self) -> dict[str, Any]:
        """The generator's state and the position in the epoch; tensors and integers only."""
        return {"rng": self._rng.get_state(), "order": self._order.cpu(), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state belongs to a data set of another size.
        """
        if len(state["order"]) != len(self.data):
            raise ValueError(f"state must be of a data set of {len(self.data)} images, got {len(state['order'])}")
        self._rng.set_state(state["rng"])
        self._order = state["order"].to(self.data.labels.device)
        self._position = state["position"]

    def _begin_epoch(self) -> None:
        order = torch.randperm(len(self.data), generator=self._rng)
        self._order = order.to(self.data.labels.device)
        self._position = 0
