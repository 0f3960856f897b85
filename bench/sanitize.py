"""Every kernel on a small shape, for compute-sanitizer: ``compute-sanitizer python -m bench.sanitize [PART ...]``.

Under it each launch takes a hundred times as long, so that the test suite would take hours. Results are compared with
the reference's, so that a part that did nothing is noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastgan import backend_status
from fastgan.bench import relative_norm
from fastgan.linalg import sqrtm, trace_sqrt_product
from fastgan.nn import SelfAttention2d
from fastgan.ops import spectral_norm_scale, spectral_norm_update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-3


def attention(device: str) -> None:
    """The block's projections, pooling, attention and residual, differentiated twice; odd sizes."""
    torch.manual_seed(0)
    block = SelfAttention2d(16).to(device)
    nn.init.constant_(block.gamma, 0.5)
    x = torch.randn(1, 16, 10, 6, device=device, requires_grad=True)

    def derivatives(impl: str) -> list[Tensor]:
        block.impl = impl
        y = block(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        return [y, gradient, *torch.autograd.grad(penalty, list(block.parameters()), materialize_grads=True)]

    _same(derivatives("triton"), derivatives("reference"))


def spectral_norm(device: str) -> None:
    """Weights of several tiles (the last to finish adds up), of a ragged tile and of one row, differentiated twice."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((70, 24 * 9), (130, 140), (1, 7))
    given = [torch.randn(size, generator=generator) for size in sizes]
    vectors = [[torch.randn(size[i], generator=generator) for size in sizes] for i in (0, 1)]
    cotangents = [[torch.randn(size, generator=generator).to(device) for size in sizes] for _ in range(2)]

    def derivatives(impl: str) -> list[Tensor]:
        weights = [w.to(device).requires_grad_() for w in given]
        us, vs = ([x.to(device, copy=True) for x in side] for side in vectors)
        u, v, sigma = spectral_norm_update(weights, us, vs, impl=impl)
        normalized = spectral_norm_scale(weights, u, v, sigma, impl=impl)
        gradients = torch.autograd.grad(normalized, weights, cotangents[0], create_graph=True)
        return [sigma, *normalized, *gradients, *torch.autograd.grad(gradients, weights, cotangents[1])]

    _same(derivatives("triton"), derivatives("reference"))


def square_roots(device: str) -> None:
    """The CUDA half's iterations, and its kernel for batches of small matrices."""
    generator = torch.Generator().manual_seed(0)
    for batch, d, method in ((3, 33, "jacobi"), (2, 70, "polar")):
        x, y = (torch.randn(batch, d, 2 * d, generator=generator, dtype=torch.float64) for _ in range(2))
        a, b = x @ x.mT, y @ y.mT
        _same([trace_sqrt_product(a.to(device), b.to(device), method=method)], [trace_sqrt_product(a, b)])
    _same([sqrtm(a.to(device), method="newton_schulz")], [sqrtm(a, method="eigh")])


PARTS: dict[str, Callable[[str], None]] = {
    "attention": attention,
    "spectral_norm": spectral_norm,
    "square_roots": square_roots,
}


def main(names: list[str]) -> None:
    """Run the named parts, or all."""
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        sys.exit(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in names or PARTS:
        extension = backend_status()[f"extension {DEVICE}"]
        if name == "square_roots" and not extension.available:
            print(f"{name}: left out, {extension.detail}", flush=True)
            continue
        PARTS[name](DEVICE)
        print(f"{name}: as the reference", flush=True)


def _same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for result, reference in zip(results, expected, strict=True):
        error = relative_norm(result.cpu(), reference.cpu())
        if not error <= TOLERANCE:
            raise RuntimeError(f"differs from the reference: relative error {error:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
