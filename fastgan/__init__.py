"""Faster attention, spectral norms, train steps and FID for GANs in PyTorch.

``fastgan.nn``
    ``SelfAttention2d``, ``spectral_norm``, ``group_spectral_norm``; ``fuse`` puts them into an existing model.
``fastgan.ops``
    The functions under them, differentiable twice: ``attention``, ``spectral_norm_update`` and others.
``fastgan.linalg``
    ``trace_sqrt_product``, ``sqrtm`` and ``nuclear_norm`` of one covariance or of batches.
``fastgan.metrics``
    ``FeatureStats``, ``frechet_distance`` and their relatives; backbones; metrics with torchmetrics' interface.
``fastgan.training``
    ``TrainStep`` captures an update of your own networks as one graph; ``Trainer`` is the loop of the recipes.
``fastgan.models``, ``losses``, ``data``, ``recipes``
    The GANs that it trains.
``fastgan.bench``
    Times implementations of the same work against each other, after comparing their results.

The first three need only torch, triton and numpy; other packages are imported when they are used. The command is
``fastgan`` or ``python -m fastgan``; ``backend_status()`` reports what this machine can run, and why not the others.
"""

import importlib
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgan import backend as backend
    from fastgan.backend import backend_status as backend_status

try:
    __version__ = metadata.version("fastgan")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"
__all__ = ["__version__", "backend_status"]

_MOVED = {
    "fastgan.diffaugment": "fastgan.losses",
    "fastgan.draws": "fastgan.losses",
    "fastgan.errors": "fastgan.metrics (InputError)",
    "fastgan.metrics.class_scores": "fastgan.metrics (inception_score)",
    "fastgan.metrics.decode": "fastgan.data.decode",
    "fastgan.metrics.distributed": "fastgan.distributed",
    "fastgan.metrics.images": "fastgan.data.image_sources",
    "fastgan.metrics.infinity": "fastgan.metrics (fid_infinity)",
    "fastgan.metrics.kernel_mmd": "fastgan.metrics.kid",
    "fastgan.metrics.modules": "fastgan.metrics.torchmetrics_api",
    "fastgan.metrics.neighbourhoods": "fastgan.metrics.prdc",
    "fastgan.metrics.resize": "fastgan.data.resize",
    "fastgan.metrics.sources": "fastgan.data.archives",
    "fastgan.regularisers": "fastgan.losses",
    "fastgan.timing": "fastgan.bench",
    "fastgan.training.callbacks": "fastgan.training.trainer",
    "fastgan.training.loop": "fastgan.training.trainer",
    "fastgan.training.networks": "fastgan.recipes.build",
    "fastgan.training.writers": "fastgan.training.reports",
}


class _MovedModules:
    """The last of Python's finders: an import of a module that moved names its new place."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in _MOVED:
            raise ImportError(f"{name} is now {_MOVED[name]}", name=name)


sys.meta_path.append(_MovedModules)


def __getattr__(name: str) -> Any:
    """Import torch no sooner than it is needed, so that the command may set variables that torch reads once."""
    if name not in ("backend", "backend_status"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    backend = importlib.import_module("fastgan.backend")
    return backend if name == "backend" else backend.backend_status
