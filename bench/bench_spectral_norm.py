"""All spectral norms of a critic: one grouped update against torch's parametrization, forward and forward+backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bench.harness import Workload
from fastgan.nn import group_spectral_norm


class Weights(nn.Module):
    """Layers whose weights are read, as a forward reads them, and not used: what is left is spectral normalisation."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # type: ignore[misc]


def _blocks(channels: Sequence[tuple[int, int, bool]]) -> list[nn.Module]:
    """Residual critic blocks (in, out, has a shortcut convolution)."""
    layers: list[nn.Module] = []
    for c_in, c_out, shortcut in channels:
        layers += [nn.Conv2d(c_in, c_out, 3, bias=False), nn.Conv2d(c_out, c_out, 3, bias=False)]
        if shortcut:
            layers.append(nn.Conv2d(c_in, c_out, 1, bias=False))
    return layers


def _attention(c: int) -> list[nn.Module]:
    pairs = ((c, c // 8), (c, c // 8), (c, c // 2), (c // 2, c))
    return [nn.Conv2d(c_in, c_out, 1, bias=False) for c_in, c_out in pairs]


def _pyramid(ch: int) -> list[tuple[int, int, bool]]:
    widths = [3, ch, 2 * ch, 4 * ch, 8 * ch, 16 * ch]
    return [(a, b, True) for a, b in pairwise(widths)] + [(16 * ch, 16 * ch, False)]


def sngan_32(width: int = 128) -> Weights:
    """SNGAN-32's critic (Miyato et al. 2018): 4 blocks of 128 channels, 11 weights."""
    blocks = [(3, width, True), (width, width, True), (width, width, False), (width, width, False)]
    return Weights([*_blocks(blocks), nn.Linear(width, 1)])


def sagan_128(ch: int = 64) -> Weights:
    """SAGAN-128's critic (Zhang et al. 2019), 1000 classes: 23 weights."""
    return Weights([*_blocks(_pyramid(ch)), *_attention(2 * ch), nn.Linear(16 * ch, 1), nn.Embedding(1000, 16 * ch)])


def biggan_128(ch: int = 96) -> Weights:
    """BigGAN-128's critic (Brock et al. 2019), 1000 classes: 23 weights."""
    return Weights([*_blocks(_pyramid(ch)), *_attention(ch), nn.Linear(16 * ch, 1), nn.Embedding(1000, 16 * ch)])


CRITICS: dict[str, Callable[[], Weights]] = {"sngan-32": sngan_32, "sagan-128": sagan_128, "biggan-128": biggan_128}


def workloads(quick: bool, device: str) -> list[Workload]:
    """Forward and forward+backward of every critic; ``quick`` leaves out all but the smallest."""
    names = ["sngan-32"] if quick else list(CRITICS)
    return [_workload(name, backward, device) for name in names for backward in (False, True)]


def _workload(name: str, backward: bool, device: str) -> Workload:
    grouped, plain = networks(name, device)
    numel = sum(p.numel() for p in grouped.parameters())
    run = _forward_backward(grouped) if backward else _forward
    return Workload(
        name=f"{name} critic, {'forward+backward' if backward else 'forward'}",
        implementations={"fastgan": lambda: run(grouped), "torch": lambda: run(plain)},
        reference="torch",
        check=_difference,
        parameters={"device": device, "layers": len(grouped.layers), "numel": numel, "dtype": "float32"},
    )


def networks(name: str, device: str) -> tuple[Weights, Weights]:
    """One critic twice, with equal weights and vectors: with the grouped norm, and with torch's."""
    torch.manual_seed(0)
    plain = CRITICS[name]()
    for layer in plain.layers:
        parametrizations.spectral_norm(layer)
    grouped = CRITICS[name]()
    group_spectral_norm(grouped)
    grouped.load_state_dict(plain.state_dict())
    return grouped.to(device), plain.to(device)


def _forward(network: Weights) -> list[Tensor]:
    with torch.no_grad():
        return network()


def _forward_backward(like: Weights) -> Callable[[Weights], list[Tensor]]:
    """Gradients of the normalised weights against fixed random cotangents, shaped as the weights of ``like``."""
    cotangents = [torch.randn_like(p) for p in like.parameters() if p.ndim > 1]

    def run(network: Weights) -> list[Tensor]:
        return list(torch.autograd.grad(network(), [p for p in network.parameters() if p.ndim > 1], cotangents))

    return run


def _difference(result: Any, reference: Any) -> float:
    """The largest relative difference of a weight, in the Frobenius norm."""
    pairs = zip(result, reference, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
