"""Attention forward, backward and under a gradient penalty, for the shapes of SAGAN, BigGAN and vision transformers.

``core`` workloads time softmax(Q K^T) V alone, ``block`` ones the whole layer, projections, pooling and residual
included, and ``heads`` ones a transformer's several heads, as they come out of a joint projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from fastgan.bench import Workload, largest_relative_norm
from fastgan.bench.eager_attention import EagerAttention
from fastgan.nn import SelfAttention2d
from fastgan.ops import attention, scaled_dot_product_attention
from fastgan.reference.attention import attention_eager

TYPICAL, LARGER = (128, 32), (64, 64)  # channels, height
OTHERS = ((256, 16), (256, 32), (96, 64), (128, 64), (192, 64), (384, 64))
SHAPES_ON_A_CPU = ((256, 16), TYPICAL, LARGER)
PASSES = ("forward", "backward", "penalty")
TOKENS = {"cuda": (1024, 4096), "cpu": (1024,)}
# Limits of one H100: exponentials and float16 products per second, bytes of device memory per second.
EXPONENTIALS, PRODUCTS, BYTES = 4e12, 8e14, 3.0e12


def workloads(quick: bool, device: str) -> Iterator[Workload]:
    """On a GPU every size in bfloat16 and two in float32, at batch 32; on a CPU three sizes at batch 4.

    ``quick`` takes one size, at batch 8. Inductor takes minutes for what is left out: on a quick CPU it compiles the
    core alone, and nowhere more than one workload under a penalty, which torch.compile refuses after the work.
    """
    cuda = device == "cuda"
    batch = 8 if quick else 32 if cuda else 4
    for channels, height, dtype in _sizes(quick, cuda):
        for mode in PASSES:
            size = (batch, channels, height, dtype, device, mode)
            compiled = mode != "penalty" or (not quick and (channels, height) == TYPICAL)
            yield _core(*size, compiled=compiled, flex=compiled and (cuda or not quick))
            yield _block(*size, compiled=compiled and (cuda or not quick))
    for tokens in TOKENS[device][: 1 if quick else None]:
        for mode in PASSES:
            yield _heads(8 if cuda else 1, tokens, torch.bfloat16 if cuda else torch.float32, device, mode)


def _sizes(quick: bool, cuda: bool) -> list[tuple[int, int, torch.dtype]]:
    if not cuda:
        return [(*size, torch.float32) for size in ((TYPICAL,) if quick else SHAPES_ON_A_CPU)]
    in_both = [(*size, d) for size in (TYPICAL, LARGER)[: 1 if quick else 2] for d in (torch.bfloat16, torch.float32)]
    return in_both if quick else [*in_both, *((*size, torch.bfloat16) for size in OTHERS)]


def _core(
    batch: int,
    channels: int,
    height: int,
    dtype: torch.dtype,
    device: str,
    mode: str,
    compiled: bool,
    flex: bool,
) -> Workload:
    n, m, d, e = height**2, height**2 // 4, channels // 8, channels // 2
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, rows, width, generator=generator, device=device, dtype=dtype).requires_grad_()
        for rows, width in ((n, d), (m, d), (m, e))
    )
    functions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "eager": attention_eager,
        "fastgan": attention,
    }
    if compiled:
        functions["compile"] = torch.compile(attention_eager, dynamic=False)
    if flex:
        functions["flex"] = _flex()
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        functions[f"sdpa {backend.name.split('_')[0].lower()}"] = _sdpa(backend)
    return Workload(
        name=f"core {mode}, C={channels} H={height} B={batch} {_short(dtype)}",
        implementations={name: _passes(f, (q, k, v), mode) for name, f in functions.items()},
        reference="eager",
        check=largest_relative_norm,
        parameters=_parameters(batch, channels, height, dtype, mode),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        floor=_floor(batch, n, m, d, e, dtype, mode) if device == "cuda" else None,
    )


def _heads(batch: int, tokens: int, dtype: torch.dtype, device: str, mode: str) -> Workload:
    """8 heads of 64 channels; on a CPU 4 of 32."""
    heads, d = (8, 64) if device == "cuda" else (4, 32)
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, tokens, 3, heads, d)
    qkv = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind())

    def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = torch.einsum("bhnd,bhmd->bhnm", q, k) * d**-0.5
        return torch.einsum("bhnm,bhmd->bhnd", torch.softmax(maps, dim=-1), v)

    def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    functions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "eager": einsum,
        "fastgan": scaled_dot_product_attention,
        "sdpa math": sdpa(SDPBackend.MATH),
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    if mode != "penalty":  # which torch.compile refuses
        functions["compile"] = torch.compile(einsum, dynamic=False)
    return Workload(
        name=f"heads {mode}, N={tokens} H={heads} d={d} B={batch} {_short(dtype)}",
        implementations={name: _passes(f, (q, k, v), mode) for name, f in functions.items()},
        reference="eager",
        check=largest_relative_norm,
        parameters={"batch": batch, "tokens": tokens, "heads": heads, "d": d, "dtype": _short(dtype), "mode": mode},
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        floor=_floor(batch * heads, tokens, tokens, d, d, dtype, mode) if device == "cuda" else None,
    )


def _block(
    batch: int, channels: int, height: int, dtype: torch.dtype, device: str, mode: str, compiled: bool
) -> Workload:
    torch.manual_seed(0)
    fused = SelfAttention2d(channels).to(device, dtype)
    nn.init.constant_(fused.gamma, 0.5)
    eager = EagerAttention(copy.deepcopy(fused))
    x = torch.randn(batch, channels, height, height, device=device, dtype=dtype).requires_grad_()

    def passes(block: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        parameters = [p for name, p in sorted(block.named_parameters())]
        return _passes(lambda x, *_: run(x), (x, *parameters), mode)

    implementations = {"eager": passes(eager, eager), "fastgan": passes(fused, fused)}
    if compiled:
        implementations["compile"] = passes(eager, torch.compile(eager, dynamic=False))
    return Workload(
        name=f"block {mode}, C={channels} H={height} B={batch} {_short(dtype)}",
        implementations=implementations,
        reference="eager",
        check=largest_relative_norm,
        parameters=_parameters(batch, channels, height, dtype, mode),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
    )


def _passes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str) -> Callable[[], list[Tensor]]:
    """The output; or the gradients of its sum of squares; or the gradients of a WGAN-GP penalty on the first input."""

    without_gradients = [x.detach() for x in inputs]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*without_gradients)]

    def backward() -> list[Tensor]:
        return list(torch.autograd.grad(function(*inputs).float().square().sum(), inputs))

    # Without this, torch.compile refuses a second gradient for its buffers' sake and not for want of one.
    @functorch_config.patch(donated_buffer=False)
    def penalty() -> list[Tensor]:
        x = inputs[0]
        (gradient,) = torch.autograd.grad(function(*inputs).float().square().sum(), x, create_graph=True)
        norms = gradient.float().flatten(1).square().sum(dim=1).sqrt()
        return list(torch.autograd.grad((norms - 1).square().mean(), inputs, allow_unused=True))

    return {"forward": forward, "backward": backward, "penalty": penalty}[mode]


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Call one of SDPA's fused backends; q and k are padded to v's channels if v has more."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = max(q.shape[2], v.shape[2])
        q, k = (F.pad(x, (0, width - x.shape[2])) for x in (q, k))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q[:, None], k[:, None], F.pad(v, (0, width - v.shape[2]))[:, None], scale=1.0
            )
        return out[:, 0, :, : v.shape[2]]

    return run


def _flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]

    return run


def _floor(batch: int, n: int, m: int, d: int, e: int, dtype: torch.dtype, mode: str) -> float:
    """Seconds an H100 needs: the largest of its exponentials, products and bytes, each pass counted once."""
    maps = batch * n * m
    # Products of q, k, v-sized operands with the maps: S and O; then S, dP, dQ, dK, dV; then both passes of the
    # second order.
    exponentials, with_d, with_e = {"forward": (1, 1, 1), "backward": (3, 4, 4), "penalty": (6, 12, 10)}[mode]
    tensors = {"forward": 1, "backward": 3, "penalty": 6}[mode]
    moved = tensors * batch * ((n + m) * d + (n + m) * e) * dtype.itemsize
    rate = PRODUCTS if dtype.itemsize == 2 else PRODUCTS / 6  # three TF32 products at half the rate of float16
    return max(exponentials * maps / EXPONENTIALS, 2 * maps * (with_d * d + with_e * e) / rate, moved / BYTES)


def _parameters(batch: int, channels: int, height: int, dtype: torch.dtype, mode: str) -> dict[str, Any]:
    return {"batch": batch, "channels": channels, "height": height, "dtype": _short(dtype), "mode": mode}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
