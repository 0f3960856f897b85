"""All spectral norms of a network: one grouped update against torch's parametrization, its older hook, torch.compile.

The networks hold the weights of published critics and generators and nothing else, so that only spectral normalization
is timed. Each weight has one singular value of 1 among small ones and starts at its vectors: every order of
updates then gives the same sigma, and the implementations can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as older_spectral_norm

from bench.limits import copied_bytes
from fastgan.bench import Workload, largest_relative_norm
from fastgan.bench.quick import Weights
from fastgan.nn import group_spectral_norm

# Passes over the weights that cannot be avoided on a GPU: reads and writes of one float32 per entry. A CPU needs
# one pass less: it sums W^T u over the rows while its caches still hold them from W v.
PASSES = {
    "forward": 4,  # W v, W^T u, and W / sigma from W
    "forward+backward": 8,  # and <G, W>, then dW from G
    "double backward": 16,  # and <G, W>, <H, G>, <H, u v^T>, then dG and dW from H, G, W
}


class OlderWeights(Weights):
    """torch's older norm, a hook before each layer's forward."""

    def forward(self) -> list[Tensor]:
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        return super().forward()


def _conv(c_in: int, c_out: int, size: int) -> nn.Module:
    return nn.Conv2d(c_in, c_out, size, bias=False)


def _linear(c_in: int, c_out: int) -> nn.Module:
    return nn.Linear(c_in, c_out, bias=False)


def _blocks(channels: Sequence[tuple[int, int, bool]]) -> list[nn.Module]:
    """Residual blocks (in, out, has a shortcut convolution)."""
    layers: list[nn.Module] = []
    for c_in, c_out, shortcut in channels:
        layers += [_conv(c_in, c_out, 3), _conv(c_out, c_out, 3)]
        if shortcut:
            layers.append(_conv(c_in, c_out, 1))
    return layers


def _attention(c: int) -> list[nn.Module]:
    pairs = ((c, c // 8), (c, c // 8), (c, c // 2), (c // 2, c))
    return [_conv(c_in, c_out, 1) for c_in, c_out in pairs]


def _down(ch: int) -> list[tuple[int, int, bool]]:
    widths = [3, ch, 2 * ch, 4 * ch, 8 * ch, 16 * ch]
    return [(a, b, True) for a, b in pairwise(widths)] + [(16 * ch, 16 * ch, False)]


def _up(ch: int) -> list[tuple[int, int, bool]]:
    return [(a, b, True) for a, b in pairwise([16 * ch, 16 * ch, 8 * ch, 4 * ch, 2 * ch, ch])]


def sngan_32_critic(width: int = 128) -> list[nn.Module]:
    """SNGAN-32's critic (Miyato et al. 2018): 4 blocks of 128 channels, 11 weights."""
    blocks = [(3, width, True), (width, width, True), (width, width, False), (width, width, False)]
    return [*_blocks(blocks), _linear(width, 1)]


def sngan_32_generator(width: int = 256) -> list[nn.Module]:
    """A generator of SNGAN-32's size, normed as SAGAN's is (SNGAN norms the critic alone): 11 weights."""
    return [_linear(128, 16 * width), *_blocks([(width, width, True)] * 3), _conv(width, 3, 3)]


def sagan_128_critic(ch: int = 64) -> list[nn.Module]:
    """SAGAN-128's critic (Zhang et al. 2019), 1000 classes: 23 weights."""
    return [*_blocks(_down(ch)), *_attention(2 * ch), _linear(16 * ch, 1), nn.Embedding(1000, 16 * ch)]


def sagan_128_generator(ch: int = 64) -> list[nn.Module]:
    """SAGAN-128's generator: 21 weights."""
    return [_linear(128, 256 * ch), *_blocks(_up(ch)), *_attention(4 * ch), _conv(ch, 3, 3)]


def biggan_128_critic(ch: int = 96) -> list[nn.Module]:
    """BigGAN-128's critic (Brock et al. 2019), 1000 classes: 23 weights."""
    return [*_blocks(_down(ch)), *_attention(ch), _linear(16 * ch, 1), nn.Embedding(1000, 16 * ch)]


def biggan_128_generator(ch: int = 96) -> list[nn.Module]:
    """BigGAN-128's generator: 41 weights, 20 of them gains and biases of batch norms from 148 conditions."""
    conditions = [_linear(148, c) for block in _up(ch) for c in block[:2] for _ in ("gain", "bias")]
    return [_linear(20, 256 * ch), *_blocks(_up(ch)), *conditions, *_attention(2 * ch), _conv(ch, 3, 3)]


NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "sngan-32 critic": sngan_32_critic,
    "sngan-32 generator": sngan_32_generator,
    "sagan-128 critic": sagan_128_critic,
    "sagan-128 generator": sagan_128_generator,
    "biggan-128 critic": biggan_128_critic,
    "biggan-128 generator": biggan_128_generator,
}


def workloads(quick: bool, device: str) -> Iterator[Workload]:
    """Three depths of differentiation for every network; ``quick`` takes the smallest.

    torch.compile has no double backward and takes minutes for the larger networks on a CPU, so neither is run.
    """
    for name in ["sngan-32 critic"] if quick else NETWORKS:
        variants = networks(name, device, by_name=not quick)
        for depth in PASSES:
            compiled = not quick and depth != "double backward" and (device == "cuda" or name.startswith("sngan"))
            yield _workload(name, depth, variants, device, compiled)


def networks(name: str, device: str, by_name: bool = False) -> dict[str, Weights]:
    """One network under each norm, with equal weights and vectors.

    These are the grouped norm (with ``by_name``, also by each ``impl`` that a CPU has), torch's parametrization and its
    older hook.
    """
    grouped = {"fastgan": "auto"}
    if by_name and device == "cpu":
        grouped |= {"fastgan extension": "extension", "fastgan reference": "reference"}
    variants: dict[str, Weights] = {}
    for implementation in (*grouped, "torch", "torch, older hook"):
        torch.manual_seed(0)
        layers = NETWORKS[name]()
        planted = [_plant(layer.weight) for layer in layers]  # type: ignore[arg-type]
        older = implementation == "torch, older hook"
        for layer, (u, v) in zip(layers, planted, strict=True):
            norm: Any = older_spectral_norm(layer) if older else parametrizations.spectral_norm(layer)
            own_u, own_v = (
                (norm.weight_u, norm.weight_v)
                if older
                else (norm.parametrizations.weight[0]._u, norm.parametrizations.weight[0]._v)
            )
            own_u.copy_(u)
            own_v.copy_(v)
        network = (OlderWeights if older else Weights)(layers).to(device)
        if implementation in grouped:
            group_spectral_norm(network, impl=grouped[implementation])
        variants[implementation] = network
    return variants


@torch.no_grad()
def _plant(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Make ``weight`` u v^T and noise of a hundredth of its norm; returns u and v."""
    rows, columns = weight.shape[0], weight[0].numel()
    u, v = (nn.functional.normalize(torch.randn(n), dim=0) for n in (rows, columns))
    noise = torch.randn(rows, columns) * 0.01 / (rows**0.5 + columns**0.5)
    weight.copy_((torch.outer(u, v) + noise).view(weight.shape))
    return u, v


def _workload(name: str, depth: str, variants: dict[str, Weights], device: str, compiled: bool) -> Workload:
    numel = sum(p.numel() for p in variants["torch"].parameters())
    run = _runs(variants["torch"])[depth]
    implementations: dict[str, Callable[[], Any]] = {
        key: functools.partial(run, network) for key, network in variants.items()
    }
    if compiled:
        implementations["torch, torch.compile"] = functools.partial(run, torch.compile(variants["torch"]))
    if device == "cuda":
        implementations["fastgan, CUDA graph"] = _graphed(implementations["fastgan"])
    moved, bandwidth = 4 * numel * (PASSES[depth] - (device == "cpu")), copied_bytes(device, 4 * numel)
    return Workload(
        name=f"{name}, {depth}",
        implementations=implementations,
        reference="torch",
        check=largest_relative_norm,
        parameters={
            "device": device,
            "layers": len(variants["torch"].layers),
            "numel": numel,
            "dtype": "float32",
            "bytes": moved,
            "copy_bandwidth": bandwidth,
        },
        floor=moved / bandwidth,
        cold=True,
    )


def _runs(like: Weights) -> dict[str, Callable[[Any], list[Tensor]]]:
    """The work at each depth, against fixed random cotangents in the shapes of the weights of ``like``."""
    shapes = [p for p in like.parameters() if p.ndim > 1]
    first, second = ([torch.randn_like(p) for p in shapes] for _ in range(2))

    def parameters(network: nn.Module) -> list[Tensor]:
        return [p for p in network.parameters() if p.ndim > 1]

    def forward(network: Any) -> list[Tensor]:
        with torch.no_grad():
            return network()

    def backward(network: Any) -> list[Tensor]:
        return list(torch.autograd.grad(network(), parameters(network), first))

    def double_backward(network: Any) -> list[Tensor]:
        weights = parameters(network)
        gradients = torch.autograd.grad(network(), weights, first, create_graph=True)
        return list(torch.autograd.grad(gradients, weights, second))

    return dict(zip(PASSES, (forward, backward, double_backward), strict=True))


def _graphed(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """``run`` as a CUDA graph, captured at the first call."""

    @functools.cache
    def captured() -> tuple[Any, list[Tensor]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        return graph, result

    def replay() -> list[Tensor]:
        graph, result = captured()
        graph.replay()
        return result

    return replay
