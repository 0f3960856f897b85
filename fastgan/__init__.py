"""Fast layers, captured train steps and large-sample FID for GANs in PyTorch.

``fastgan.nn``
    ``SelfAttention2d``, ``spectral_norm``, ``group_spectral_norm``; ``fuse`` puts them into a model that exists.
``fastgan.ops``
    The functions under them, differentiable twice: ``attention``, ``spectral_norm_update`` and others.
``fastgan.linalg``
    ``trace_sqrt_product``, ``sqrtm`` and ``nuclear_norm`` of one covariance or of batches.
``fastgan.metrics``
    ``FeatureStats``, ``frechet_distance`` and their relatives; backbones; metrics with torchmetrics' interface.
``fastgan.training``
    ``TrainStep`` captures an update of your own networks as one graph; ``Trainer`` is the loop of the recipes.
``fastgan.models``, ``losses``, ``regularisers``, ``diffaugment``, ``data``, ``recipes``
    The GANs that are trained by it.

The first three need torch, triton and numpy alone; everything else is imported where it is used. The command is
``fastgan`` or ``python -m fastgan``; ``backend_status()`` tells what this machine can run, and why not the rest.
"""

from fastgan.backend import backend_status

__version__ = "0.1.0"
__all__ = ["__version__", "backend_status"]
