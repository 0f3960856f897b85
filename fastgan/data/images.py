"""Sets of labeled images, with sketches if there are any, and their splits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgan._checks import FLOATS, check_tensor

PIXELS = (torch.uint8, *FLOATS)


@dataclass(frozen=True)
class LabeledImages:
    """Images (n, channels, h, w) with labels (n,) int64 in [0, n_classes).

    Pixels are floating-point in [-1, 1], or uint8 in [0, 255], a quarter of the memory.

    Attributes:
        sketches: (m, sketch channels, h, w), pixels likewise; None for none. Without ``sketch_labels`` they are paired:
            m is n, and sketch i belongs to image i.
        sketch_labels: int64 (m,), classes of unpaired sketches; every class of the images must have a sketch.
        class_names: one per class, or none.

    Raises:
        ValueError: shapes, dtypes, or a label disagree with that.

    Example:
        >>> data = LabeledImages(torch.rand(20, 3, 8, 8) * 2 - 1, torch.arange(20) % 2, n_classes=2)
        >>> len(data), len(data.subset(torch.arange(5)))
        (20, 5)
    """

    images: Tensor
    labels: Tensor
    n_classes: int
    sketches: Tensor | None = None
    sketch_labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_tensor("images", self.images, ndim=4, dtypes=PIXELS)
        if not len(self.images):
            raise ValueError("images must hold at least one image, got none")
        _check_labels("labels", self.labels, len(self.images), self.n_classes, "images")
        if self.class_names and len(self.class_names) != self.n_classes:
            raise ValueError(f"class_names must be {self.n_classes} names or none, got {len(self.class_names)}")
        if self.sketches is None:
            if self.sketch_labels is not None:
                raise ValueError("sketch_labels need sketches")
            return
        check_tensor("sketches", self.sketches, ndim=4, dtypes=PIXELS)
        if self.sketches.shape[2:] != self.images.shape[2:]:
            raise ValueError(
                f"sketches must be as large as the images, {tuple(self.images.shape[2:])}, "
                f"got {tuple(self.sketches.shape[2:])}"
            )
        if self.sketch_labels is None:
            if len(self.sketches) != len(self.images):
                raise ValueError(
                    f"paired sketches must be as many as the images, {len(self.images)}, got {len(self.sketches)}"
                )
            return
        _check_labels("sketch_labels", self.sketch_labels, len(self.sketches), self.n_classes, "sketches")
        missing = sorted(set(self.labels.unique().tolist()) - set(self.sketch_labels.unique().tolist()))
        if missing:
            raise ValueError(f"every class of the images must have a sketch, class {missing[0]} has none")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def paired(self) -> bool:
        """Whether each image has its own sketch."""
        return self.sketches is not None and self.sketch_labels is None

    def to(self, device: torch.device | str) -> LabeledImages:
        """The same images on ``device``."""
        tensors = {name: getattr(self, name) for name in ("images", "labels", "sketches", "sketch_labels")}
        return replace(self, **{name: value.to(device) for name, value in tensors.items() if value is not None})

    def subset(self, index: Tensor) -> LabeledImages:
        """The images at ``index``, an int64 or bool tensor, in that order; unpaired sketches stay all."""
        sketches = self.sketches[index] if self.paired and self.sketches is not None else self.sketches
        return replace(self, images=self.images[index], labels=self.labels[index], sketches=sketches)


def _check_labels(name: str, labels: Tensor, n: int, n_classes: int, of: str) -> None:
    check_tensor(name, labels, ndim=1, dtypes=(torch.int64,))
    if len(labels) != n:
        raise ValueError(f"{name} must have shape ({n},) as {of}, got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"{name} must be in [0, {n_classes}), got {low} to {high}")


def as_float(pixels: Tensor) -> Tensor:
    """Floating-point pixels in [-1, 1] as they are; uint8 ones as float32, 0 to -1 and 255 to 1.

    Example:
        >>> as_float(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels


def mostly_color(images: Tensor) -> bool:
    """Return whether more than half of the images (n, channels, h, w) have channels that differ."""
    if images.shape[1] == 1:
        return False
    gray = sum(int((part == part[:, :1]).flatten(1).all(1).sum()) for part in images.split(1000))
    return 2 * gray < len(images)


def stratified_split(data: LabeledImages, *, held_out: float, seed: int = 0) -> tuple[LabeledImages, LabeledImages]:
    """Split so that each class gives the same part, to the nearest image, to the second set.

    Each of the two sets keeps the order of ``data``; the same seed gives the same split on every device.

    Raises:
        ValueError: ``held_out`` is not in (0, 1), or leaves one of the sets empty.

    Example:
        >>> data = LabeledImages(torch.rand(20, 3, 8, 8) * 2 - 1, torch.arange(20) % 2, n_classes=2)
        >>> train, held_out = stratified_split(data, held_out=0.2)
        >>> held_out.labels.bincount()
        tensor([2, 2])
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
    if chosen.all() or not chosen.any():
        raise ValueError(f"held_out must leave images in both parts of {len(labels)}, got {held_out}")
    chosen = chosen.to(data.labels.device)
    return data.subset(~chosen), data.subset(chosen)
