"""What the demonstration times: each workload with an eager baseline and with fastgan, in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastgan.bench.timing import Timing, compare
from fastgan.linalg import trace_sqrt_product
from fastgan.models import SAGANDiscriminator
from fastgan.nn import group_spectral_norm
from fastgan.ops import attention
from fastgan.reference.attention import attention_eager

if TYPE_CHECKING:
    from rich.progress import Progress

ATTENTION_SHAPE = (8, 1024, 256, 16, 64)
CRITIC_WIDTH = 64


@dataclass(frozen=True)
class TimedWorkload:
    """Timings by implementation; ``"fastgan"`` and ``baseline`` are among them."""

    workload: str
    size: str
    baseline: str
    dtype: str
    device: str
    timings: Mapping[str, Timing]

    @property
    def speedup(self) -> float:
        """Median time of the baseline over fastgan's."""
        return self.timings[self.baseline].median / self.timings["fastgan"].median


def time_workloads(progress: Progress, *, seconds: float, sqrtm_dim: int) -> list[TimedWorkload]:
    """Time attention, a critic's spectral norms, and the trace of a matrix square root."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workloads: list[Callable[[], list[TimedWorkload]]] = [
        lambda: _attention(device, seconds),
        lambda: _spectral_norms(device, seconds),
        lambda: _trace_sqrt(sqrtm_dim, device),
    ]
    task = progress.add_task("timing against eager code", total=len(workloads))
    results = []
    for run in workloads:
        results += run()
        progress.advance(task)
    return results


def _attention(device: str, seconds: float) -> list[TimedWorkload]:
    b, n, m, d, e = ATTENTION_SHAPE
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in ((b, n, d), (b, m, d), (b, m, e)))
    grad_o = torch.randn(b, n, e, device=device)

    def both(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        @torch.no_grad()
        def forward() -> Tensor:
            return f(q, k, v)

        return forward, lambda: torch.autograd.grad(f(q, k, v), (q, k, v), grad_o)

    eager_forward, eager_backward = both(attention_eager)
    fast_forward, fast_backward = both(attention)
    size = f"B {b}, N {n}, M {m}, d {d}, e {e}"
    return [
        _workload("attention forward", size, "eager", device, eager_forward, fast_forward, seconds),
        _workload("attention forward + backward", size, "eager", device, eager_backward, fast_backward, seconds),
    ]


class Weights(nn.Module):
    """Layers whose weights are read, as a forward reads them, and not used."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        return [cast(Tensor, layer.weight) for layer in self.layers]


def normalisable(network: nn.Module) -> list[nn.Module]:
    """The layers of ``network`` that take a spectral norm."""
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]


def _spectral_norms(device: str, seconds: float) -> list[TimedWorkload]:
    def weights() -> Weights:
        return Weights(normalisable(SAGANDiscriminator(10, width=CRITIC_WIDTH, spectral_norm=False).to(device)))

    eager = weights()
    for layer in eager.layers:
        nn.utils.parametrizations.spectral_norm(layer)
    fast = weights()
    group_spectral_norm(fast)

    def backward(root: Weights) -> Callable[[], Any]:
        parameters = [p for name, p in root.named_parameters() if name.endswith("original")]
        cotangents = [torch.randn_like(w) for w in root()]
        return lambda: torch.autograd.grad(root(), parameters, cotangents)

    size = f"{len(fast.layers)} weights of a SAGAN-32 critic"
    with torch.no_grad():
        forward = _workload("spectral norms forward", size, "torch", device, eager, fast, seconds)
    both = _workload(
        "spectral norms forward + backward", size, "torch", device, backward(eager), backward(fast), seconds
    )
    return [forward, both]


def _trace_sqrt(dim: int, device: str) -> list[TimedWorkload]:
    import scipy.linalg

    def covariance() -> Tensor:
        mixing = torch.randn(dim, dim, dtype=torch.float64) / dim**0.5
        return torch.cov(mixing @ torch.randn(dim, 4 * dim, dtype=torch.float64))

    a, b = covariance(), covariance()
    a_device, b_device = a.to(device), b.to(device)
    implementations = {
        "scipy": lambda: scipy.linalg.sqrtm((a @ b).numpy()).trace().real,
        "fastgan": lambda: trace_sqrt_product(a_device, b_device).item(),
    }
    implementations["fastgan"]()
    timings = compare(implementations, seconds=0, min_rounds=3, warmup=0)
    return [TimedWorkload("tr((AB)^(1/2))", f"d {dim}", "scipy", "float64", device, timings)]


def _workload(
    name: str,
    size: str,
    baseline: str,
    device: str,
    eager: Callable[[], Any],
    fast: Callable[[], Any],
    seconds: float,
) -> TimedWorkload:
    timings = compare({baseline: eager, "fastgan": fast}, seconds=seconds)
    return TimedWorkload(name, size, baseline, "float32", device, timings)
