"""The demonstration's three measurements: what fastgan is for, in a few seconds each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastgan.bench.eager_attention import EagerAttention
from fastgan.bench.harness import Workload, largest_relative_norm, relative_difference
from fastgan.linalg import trace_sqrt_product
from fastgan.models import SAGANDiscriminator
from fastgan.nn import SelfAttention2d, group_spectral_norm

BATCH, CHANNELS, HEIGHT = 1, 64, 64
CRITIC_WIDTH = 64


def workloads(device: str, sqrtm_dim: int) -> Iterator[Workload]:
    """Yield a gradient penalty through attention, a critic's spectral norms, and the matrix square root of FID."""
    yield gradient_penalty(device)
    yield spectral_norms(device)
    yield matrix_square_root(device, sqrtm_dim)


def gradient_penalty(device: str) -> Workload:
    """Gradients of a WGAN-GP penalty on a self-attention block, beside the block as it is usually written."""
    block = SelfAttention2d(CHANNELS).to(device)
    nn.init.constant_(block.gamma, 0.5)
    blocks = {"eager PyTorch": EagerAttention(copy.deepcopy(block)), "fastgan": block}
    x = torch.randn(BATCH, CHANNELS, HEIGHT, HEIGHT, device=device, requires_grad=True)

    def penalty_gradients(block: nn.Module) -> list[Tensor]:
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        return list(torch.autograd.grad(penalty, [x, *block.parameters()]))

    return Workload(
        f"gradient penalty through attention, {HEIGHT}x{HEIGHT}",
        {name: functools.partial(penalty_gradients, block) for name, block in blocks.items()},
        reference="eager PyTorch",
        check=largest_relative_norm,
        parameters={"batch": BATCH, "channels": CHANNELS, "height": HEIGHT, "dtype": "float32"},
    )


class Weights(nn.Module):
    """Layers whose forward reads every weight and uses none."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        return [cast(Tensor, layer.weight) for layer in self.layers]


def spectral_norms(device: str) -> Workload:
    """All spectral norms of a critic, forward and backward, beside torch's parametrization."""

    def critic() -> Weights:
        network = SAGANDiscriminator(10, width=CRITIC_WIDTH, spectral_norm=False).to(device)
        layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding))]
        for layer in layers:
            nn.utils.parametrizations.spectral_norm(layer)
        return Weights(layers)

    single, grouped = critic(), critic()
    group_spectral_norm(grouped).load_state_dict(single.state_dict())
    cotangents = [torch.randn_like(w) for w in single()]
    grouped()  # as many updates as the other

    def gradients(network: nn.Module) -> list[Tensor]:
        raw = [p for name, p in network.named_parameters() if name.endswith("original")]
        return list(torch.autograd.grad(network(), raw, cotangents))

    return Workload(
        "spectral norms of a SAGAN critic, with gradients",
        {"torch": lambda: gradients(single), "fastgan": lambda: gradients(grouped)},
        reference="torch",
        check=largest_relative_norm,
        parameters={"weights": len(single.layers), "width": CRITIC_WIDTH, "dtype": "float32"},
    )


def matrix_square_root(device: str, dim: int) -> Workload:
    """tr((AB)^(1/2)) of two covariances, beside SciPy."""
    import scipy.linalg

    def covariance() -> Tensor:
        mixing = torch.randn(dim, dim, dtype=torch.float64) / dim**0.5
        return torch.cov(mixing @ torch.randn(dim, 4 * dim, dtype=torch.float64))

    a, b = covariance(), covariance()
    on_device = a.to(device), b.to(device)
    return Workload(
        f"matrix square root of FID, {dim}x{dim}",
        {
            "scipy": lambda: scipy.linalg.sqrtm((a @ b).numpy()).trace().real,
            "fastgan": lambda: trace_sqrt_product(*on_device),
        },
        reference="scipy",
        check=relative_difference,
        parameters={"d": dim, "dtype": "float64"},
        warmup=0,
    )
