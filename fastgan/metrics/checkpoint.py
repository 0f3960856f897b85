"""Statistics that survive an interruption: a file for each set of images and process, named by what it depends on."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.image_sources import ImageSource
from fastgan.distributed import World
from fastgan.metrics.backbones import Backbone
from fastgan.metrics.moments import float64_device
from fastgan.metrics.stats import FeatureStats
from fastgan.metrics.stats_file import load_stats, read_npz, save_stats


class Checkpoint:
    """The file in ``folder`` of one pass. Other images, another backbone, resizing, precision or number of processes
    have a file of their own, and so have images that were changed since.

    Raises:
        InputError: ``folder`` cannot be made.
    """

    def __init__(
        self, folder: Path, source: ImageSource, backbone: Backbone, resize: str, world: World, keep_features: bool
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--checkpoint {folder} cannot be made: {error.strerror}") from error
        identity = [
            source.fingerprint(),
            [backbone.name, backbone.dim, backbone.precision, resize],
            [world.rank, world.size, source.skip_bad, keep_features],
        ]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        name = re.sub(r"[^\w.-]+", "_", Path(source.label).name) or "images"
        self.path = folder / f"{name}-{digest}.npz"
        self._device = backbone.device

    def restore(
        self, stats: FeatureStats, features: list[Tensor] | None, skipped: list[str]
    ) -> tuple[FeatureStats, list[Tensor] | None, int]:
        """Statistics, features and number of images done of the file; what was given and 0 where there is none.
        ``skipped`` is filled."""
        if not self.path.exists():
            return stats, features, 0
        arrays = read_npz(self.path)
        skipped[:] = json.loads(str(arrays["skipped"]))
        if features is not None:
            features = [torch.from_numpy(arrays["features"])]
        return load_stats(self.path).to(float64_device(self._device)), features, int(arrays["done"])

    def save(self, stats: FeatureStats, features: list[Tensor] | None, skipped: list[str], done: int) -> None:
        """Write the file, whole or not at all; nothing while there are fewer than two vectors."""
        if (stats.n or 0) < 2:
            return
        extra = {"done": np.array(done), "skipped": np.array(json.dumps(skipped))}
        if features is not None:
            extra["features"] = torch.cat(features).numpy()
        save_stats(stats, self.path, extra=extra)
