"""Real handwritten digits that need no download."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastgan.data.images import LabelledImages, stratified_split


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
