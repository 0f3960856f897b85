"""Small workloads of attention, spectral norms and the matrix square root, which the demonstration times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgan.bench.harness import Workload, largest_relative_norm, relative_difference
from fastgan.linalg import trace_sqrt_product
from fastgan.models import SAGANDiscriminator
from fastgan.nn import group_spectral_norm
from fastgan.ops import attention
from fastgan.reference.attention import attention_eager

ATTENTION_SHAPE = (8, 1024, 256, 16, 64)
CRITIC_WIDTH = 64


class Weights(nn.Module):
    """Layers whose forward reads every weight and uses none."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        return [cast(Tensor, layer.weight) for layer in self.layers]


def workloads(device: str, sqrtm_dim: int) -> Iterator[Workload]:
    """Yield attention, a critic's spectral norms and the trace of a matrix square root, with the usual baselines."""
    import scipy.linalg

    b, n, m, d, e = ATTENTION_SHAPE
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in ((b, n, d), (b, m, d), (b, m, e)))
    grad_o = torch.randn(b, n, e, device=device)
    size: dict[str, Any] = {"B": b, "N": n, "M": m, "d": d, "e": e, "dtype": "float32"}
    cores = {"eager": attention_eager, "fastgan": attention}
    forward = {name: torch.no_grad()(lambda f=f: [f(q, k, v)]) for name, f in cores.items()}
    backward = {name: lambda f=f: torch.autograd.grad(f(q, k, v), (q, k, v), grad_o) for name, f in cores.items()}
    yield Workload("attention forward", forward, "eager", largest_relative_norm, size)
    yield Workload("attention forward + backward", backward, "eager", largest_relative_norm, size)

    def critic() -> Weights:
        network = SAGANDiscriminator(10, width=CRITIC_WIDTH, spectral_norm=False).to(device)
        layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding))]
        for layer in layers:
            nn.utils.parametrizations.spectral_norm(layer)
        return Weights(layers)

    single, grouped = critic(), critic()
    group_spectral_norm(grouped).load_state_dict(single.state_dict())
    norms = {"torch": single, "fastgan": grouped}
    cotangents = [torch.randn_like(w) for w in single()]
    grouped()  # as many updates as the other
    parameters = {
        key: [p for name, p in root.named_parameters() if name.endswith("original")] for key, root in norms.items()
    }
    size = {"weights": len(single.layers), "of": "a SAGAN-32 critic", "dtype": "float32"}
    forward = {name: torch.no_grad()(lambda root=root: root()) for name, root in norms.items()}
    backward = {
        name: lambda name=name: torch.autograd.grad(norms[name](), parameters[name], cotangents) for name in norms
    }
    yield Workload("spectral norms forward", forward, "torch", largest_relative_norm, size)
    yield Workload("spectral norms forward + backward", backward, "torch", largest_relative_norm, size)

    def covariance() -> Tensor:
        mixing = torch.randn(sqrtm_dim, sqrtm_dim, dtype=torch.float64) / sqrtm_dim**0.5
        return torch.cov(mixing @ torch.randn(sqrtm_dim, 4 * sqrtm_dim, dtype=torch.float64))

    x, y = covariance(), covariance()
    on_device = x.to(device), y.to(device)
    roots = {
        "scipy": lambda: scipy.linalg.sqrtm((x @ y).numpy()).trace().real,
        "fastgan": lambda: trace_sqrt_product(*on_device),
    }
    size = {"d": sqrtm_dim, "dtype": "float64"}
    yield Workload("tr((AB)^(1/2))", roots, "scipy", relative_difference, size, warmup=0)
