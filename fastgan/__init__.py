"""Fast layers, captured train steps and large-sample FID for GANs in PyTorch.

``fastgan.nn`` and ``fastgan.ops`` hold the layers, ``fastgan.linalg`` the matrix square roots, ``fastgan.metrics`` the
Frechet distance. These need torch, triton and numpy alone; everything else is imported where it is used.
"""

from fastgan.backend import backend_status

__version__ = "0.1.0"
__all__ = ["__version__", "backend_status"]
