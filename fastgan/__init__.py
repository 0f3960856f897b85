"""Fast layers, captured train steps and large-sample FID for GANs in PyTorch.

``fastgan.nn`` and ``fastgan.ops`` hold the layers, ``fastgan.linalg`` the matrix square roots, ``fastgan.metrics`` the
Frechet distances and their relatives, ``fastgan.models``, ``losses``, ``data``, ``recipes`` and ``training`` the GANs.
The first three need torch, triton and numpy alone; everything else is imported where it is used. The command is
``fastgan`` or ``python -m fastgan``; ``backend_status()`` tells what this machine can run, and why not the rest.
"""

from fastgan.backend import backend_status

__version__ = "0.1.0"
__all__ = ["__version__", "backend_status"]
