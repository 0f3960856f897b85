"""Endless batches from a data set in memory, on the device if it fits there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastgan._checks import check_tensor
from fastgan.data.images import LabeledImages, as_float

Batch = dict[str, Tensor]

SKETCHES = ("none", "edges", "paired", "unpaired")


class DeviceLoader:
    """Endless shuffled batches: "images" (n, channels, h, w) in [-1, 1], "labels" (n,), and perhaps "sketches".

    Every epoch is a fresh permutation, an incomplete last batch is dropped. Order, flips and choice of sketches come
    from a generator of the loader's own on the CPU, dequantization noise from one on the device; :meth:`state_dict`
    restores both, to the batch.

    Args:
        data: the images. Batches are on their device unless ``device`` says another: a set that is too large for the
            device stays where it is, and its batches are moved.
        batch_size: images a batch, from 1 to ``len(data)``.
        seed: of order, flips and noise.
        flip: mirror each image, and its own sketch with it, left to right with probability 1/2.
        dequantize: add uniform noise of one gray level, 2/256, as wide as the quantization of 8-bit pixels.
        sketches: "none"; "edges", the edge map of each image; "paired", the data's sketch of each image; "unpaired", a
            random one of the data's sketches of the same class.
        rank, parts: give this one of ``parts`` equal parts of each batch: loaders of the same seed that give all parts
            give the batches of one that gives them whole, and come to the end of an epoch together.

    Raises:
        ValueError: an argument is outside its range, or the data has not the sketches asked for.

    Example:
        >>> data = LabeledImages(torch.rand(20, 3, 8, 8) * 2 - 1, torch.arange(20) % 2, n_classes=2)
        >>> batch = DeviceLoader(data, 8).next()
        >>> batch["images"].shape, batch["labels"].shape
        (torch.Size([8, 3, 8, 8]), torch.Size([8]))
    """

    def __init__(
        self,
        data: LabeledImages,
        batch_size: int,
        *,
        seed: int = 0,
        flip: bool = False,
        dequantize: bool = False,
        sketches: str = "none",
        device: torch.device | str | None = None,
        rank: int = 0,
        parts: int = 1,
    ) -> None:
        if not 1 <= batch_size <= len(data):
            raise ValueError(f"batch_size must be from 1 to the number of images, {len(data)}, got {batch_size}")
        if not 0 <= rank < parts:
            raise ValueError(f"rank must be at least 0 and less than parts, got {rank} and {parts}")
        part_size(batch_size, parts)
        check_sketches(data, sketches)
        self._part = slice(rank * batch_size // parts, (rank + 1) * batch_size // parts)
        self.data = data
        self.batch_size = batch_size
        self.flip, self.dequantize, self.sketches = flip, dequantize, sketches
        self.device = data.images.device if device is None else torch.device(device)
        self._rng = torch.Generator().manual_seed(seed)
        self._noise_rng = torch.Generator(self.device).manual_seed(seed)
        self._by_class = _ByClass(data) if sketches == "unpaired" else None
        self._begin_epoch()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next()

    def next(self) -> Batch:
        """The next batch."""
        if self._position + self.batch_size > len(self.data):
            self._begin_epoch()
        whole = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        index = whole[self._part]  # random numbers are drawn for the whole batch, whichever part of it is this loader's
        images = as_float(self._moved(self.data.images[index]))
        batch = {"images": images, "labels": self._moved(self.data.labels[index])}
        if self.sketches in ("paired", "unpaired"):
            assert self.data.sketches is not None
            chosen = index
            if self._by_class is not None:
                chosen = self._by_class.choose(self.data.labels[whole], self._rng)[self._part]
            batch["sketches"] = as_float(self._moved(self.data.sketches[chosen]))
        if self.flip:
            flipped = torch.rand(len(whole), generator=self._rng)[self._part] < 0.5
            mirrored = self._moved(flipped)[:, None, None, None]
            for key in ("images", "sketches"):
                if key in batch:
                    batch[key] = torch.where(mirrored, batch[key].flip(3), batch[key])
        if self.sketches == "edges":
            batch["sketches"] = edge_map(batch["images"])
        if self.dequantize:
            shape = (len(whole), *images.shape[1:])
            noise = torch.rand(shape, generator=self._noise_rng, device=self.device)[self._part]
            batch["images"] = (batch["images"] + (2 * noise - 1) / 256).clamp(-1, 1)
        return batch

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The generators' states and the position in the epoch; tensors and integers only."""
        return {
            "rng": self._rng.get_state(),
            "noise_rng": self._noise_rng.get_state(),
            "order": self._order.cpu(),
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state belongs to a data set of another size.
        """
        if len(state["order"]) != len(self.data):
            raise ValueError(f"state must be of a data set of {len(self.data)} images, got {len(state['order'])}")
        self._rng.set_state(state["rng"])
        self._noise_rng.set_state(state["noise_rng"])
        self._order = state["order"].to(self.data.labels.device)
        self._position = state["position"]

    def _begin_epoch(self) -> None:
        order = torch.randperm(len(self.data), generator=self._rng)
        self._order = order.to(self.data.labels.device)
        self._position = 0


class StreamLoader:
    """Endless batches from a ``torch.utils.data.Dataset``, a ``DataLoader``, or any iterable of batches.

    An item is images, ``(images, labels)``, or a mapping with "images" and perhaps "labels" and "sketches". A dataset
    with a length is shuffled into batches; a loader or an iterable gives batches as they are, and is gone through again
    at its end. Each process gives its own part of a batch.

    Args:
        source: where items come from.
        batch_size: samples per batch of a dataset; others decide themselves.
        n_classes: number of classes, 0 if labels do not matter.
        device: where batches go.
        seed: of a dataset's order.

    Raises:
        TypeError, ValueError: while batches are read, the first that is wrong is named: images must be floating-point
            (n, channels, h, w) in [-1, 1], labels int64 (n,) in [0, n_classes).

    Example:
        >>> batches = [torch.rand(8, 3, 16, 16) * 2 - 1] * 3
        >>> StreamLoader(batches, 8).next()["images"].shape
        torch.Size([8, 3, 16, 16])
    """

    def __init__(
        self,
        source: Iterable[Any] | Dataset[Any],
        batch_size: int,
        *,
        n_classes: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
            rng = torch.Generator().manual_seed(seed)
            source = DataLoader(source, batch_size, shuffle=True, drop_last=True, generator=rng)
            if not len(source):
                raise ValueError(f"data must have at least batch_size samples, {batch_size}")
        elif isinstance(source, IterableDataset):
            source = DataLoader(source, batch_size, drop_last=True)
        if not isinstance(source, Iterable):
            kinds = "LabeledImages, a Dataset, a DataLoader or an iterable of batches"
            raise TypeError(f"data must be {kinds}, got {type(source).__name__}")
        self._source, self.n_classes, self.device = source, n_classes, torch.device(device)
        self._batches: Iterator[Any] = iter(())
        self._count = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next()

    def next(self) -> Batch:
        """The next batch, on the device."""
        try:
            item = next(self._batches)
        except StopIteration:
            self._batches = iter(self._source)
            try:
                item = next(self._batches)
            except StopIteration:
                raise ValueError("data must give batches again when it is gone through again, it gave none") from None
        self._count += 1
        if isinstance(item, Mapping):
            batch = dict(item)
        elif isinstance(item, (tuple, list)):
            batch = dict(zip(("images", "labels"), item, strict=False))
        else:
            batch = {"images": item}
        self._check(batch)
        if "labels" not in batch:
            batch["labels"] = torch.zeros(len(batch["images"]), dtype=torch.int64)
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _check(self, batch: Batch) -> None:
        where = f"batch {self._count} of data"
        if "images" not in batch:
            raise ValueError(f"{where} must have 'images', got {', '.join(map(repr, batch))}")
        for name in {"images", "sketches"} & batch.keys():
            check_tensor(f"{name} of {where}", batch[name], ndim=4)
        images = batch["images"]
        if self._count == 1 and images.numel():  # the rest follow it; a test of each would stall a GPU
            least, most = images.aminmax()
            if not (least >= -1 and most <= 1):
                raise ValueError(f"images of {where} must be in [-1, 1], got [{float(least):.4g}, {float(most):.4g}]")
        if "labels" not in batch:
            if self.n_classes:
                raise ValueError(f"{where} must have labels for a network with {self.n_classes} classes")
            return
        labels = batch["labels"]
        check_tensor(f"labels of {where}", labels, ndim=1, dtypes=(torch.int64,))
        if len(labels) != len(images):
            raise ValueError(f"labels of {where} must be as many as the images, {len(images)}, got {len(labels)}")
        if self.n_classes and not bool(((labels >= 0) & (labels < self.n_classes)).all()):
            raise ValueError(f"labels of {where} must be in [0, {self.n_classes}), got {labels.unique().tolist()[:8]}")

    def state_dict(self) -> dict[str, Any]:
        """The number of batches so far. The order of a user's data is the user's to restore."""
        return {"batches": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the count."""
        self._count = state["batches"]


class _ByClass:
    """Random sketches of given classes."""

    def __init__(self, data: LabeledImages) -> None:
        assert data.sketch_labels is not None
        self.order = torch.argsort(data.sketch_labels, stable=True)
        self.counts = torch.bincount(data.sketch_labels, minlength=data.n_classes)
        self.starts = self.counts.cumsum(0) - self.counts

    def choose(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """Indices of sketches, one for each label."""
        part = torch.rand(len(labels), generator=rng, dtype=torch.float64).to(labels.device)
        within = (part * self.counts[labels]).long()
        return self.order[self.starts[labels] + within]


def part_size(batch_size: int, parts: int) -> int:
    """Samples of one process. Raises ``ValueError`` unless ``parts`` processes can share a batch equally."""
    if batch_size % parts:
        raise ValueError(f"batch_size must be divisible by the number of processes, {parts}, got {batch_size}")
    return batch_size // parts


def check_sketches(data: LabeledImages, sketches: str) -> None:
    """Raise ``ValueError`` if ``sketches`` is not one of :data:`SKETCHES`, or ``data`` lacks what it asks for."""
    if sketches not in SKETCHES:
        raise ValueError(f"sketches must be one of {', '.join(map(repr, SKETCHES))}, got {sketches!r}")
    if sketches == "paired" and not data.paired:
        raise ValueError("sketches 'paired' needs data with a sketch for each image")
    if sketches == "unpaired" and data.sketch_labels is None:
        raise ValueError("sketches 'unpaired' needs data with sketches and their labels")


def sketches_of(data: LabeledImages, sketches: str) -> Tensor:
    """Sketches for the first images of ``data`` in order, as a loader would pair them, without flips or noise: of each
    image, or, unpaired, for each image the data's next sketch of the same class.

    Raises:
        ValueError: as :func:`check_sketches`, or ``sketches`` is "none".

    Example:
        >>> data = LabeledImages(torch.rand(20, 3, 8, 8) * 2 - 1, torch.arange(20) % 2, n_classes=2)
        >>> sketches_of(data, "edges").shape
        torch.Size([20, 1, 8, 8])
    """
    check_sketches(data, sketches)
    if sketches == "none":
        raise ValueError("sketches must not be 'none' for a generator that starts from sketches")
    if sketches == "edges":
        return edge_map(as_float(data.images))
    assert data.sketches is not None
    if sketches == "paired":
        return as_float(data.sketches)
    by_class = _ByClass(data)
    seen = torch.zeros_like(by_class.counts)
    chosen = []
    for label in data.labels.tolist():
        chosen.append(by_class.order[by_class.starts[label] + seen[label] % by_class.counts[label]])
        seen[label] += 1
    return as_float(data.sketches[torch.stack(chosen)])


def edge_map(images: Tensor) -> Tensor:
    """A line drawing of each image: dark strokes (-1) on white paper (1) where the brightness changes.

    The strength of a stroke is the magnitude of the Sobel gradient of the channels' mean, over its maximum in the
    image; an image of one color gives blank paper.

    Args:
        images: (n, channels, h, w), floating-point in [-1, 1].

    Returns:
        (n, 1, h, w) in [-1, 1].

    Example:
        >>> edge_map(torch.rand(2, 3, 16, 16) * 2 - 1).shape
        torch.Size([2, 1, 16, 16])
    """
    check_tensor("images", images, ndim=4)
    gray = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    smooth, difference = images.new_tensor([1.0, 2.0, 1.0]), images.new_tensor([-1.0, 0.0, 1.0])
    across = torch.outer(smooth, difference)
    gradients = F.conv2d(gray, torch.stack([across, across.T])[:, None])
    strength = gradients.square().sum(1, keepdim=True).sqrt()
    peak = strength.amax((2, 3), keepdim=True).clamp_min(1e-3)
    return 1 - 2 * strength / peak
