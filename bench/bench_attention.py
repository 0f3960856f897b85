"""Attention forward, backward and under a gradient penalty, for the shapes of SAGAN, BigGAN and vision transformers.

``core`` workloads time softmax(Q K^T) V alone, ``block`` ones the whole layer, projections, pooling and residual
included, and ``heads`` ones a transformer's several heads, as they come out of a joint projection.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bench import limits
from fastgan.bench import Workload, largest_relative_norm
from fastgan.bench.eager_attention import EagerAttention
from fastgan.nn import SelfAttention2d
from fastgan.ops import attention, pooled_projection, projection_residual, scaled_dot_product_attention
from fastgan.reference.attention import attention_eager

TYPICAL, LARGER = (128, 32), (64, 64)  # channels, height
OTHERS = ((256, 16), (256, 32), (96, 64), (128, 64), (192, 64), (384, 64))
SHAPES_ON_A_CPU = ((256, 16), TYPICAL, LARGER)
PASSES = ("forward", "backward", "penalty")
TOKENS = {"cuda": (1024, 4096), "cpu": (1024,)}


def workloads(quick: bool, device: str) -> Iterator[Workload]:
    """On a GPU every size in bfloat16 and two in float32, at batch 32; on a CPU three sizes at batch 4.

    ``quick`` takes one size, at batch 8. Inductor takes minutes for what is left out: on a quick CPU it compiles the
    core alone, and nowhere more than one workload under a penalty, which torch.compile refuses after the work.
    """
    cuda = device == "cuda"
    batch = 8 if quick else 32 if cuda else 4
    usual = torch.bfloat16 if cuda else torch.float32
    for channels, height, dtype in _sizes(quick, cuda):
        for mode in PASSES:
            size = (batch, channels, height, dtype, device, mode)
            typical = not quick and (channels, height) == TYPICAL
            compiled = mode != "penalty" or typical
            flex = compiled and (cuda or typical)
            yield _core(*size, compiled=compiled, flex=flex, by_name=typical)
            yield _block(*size, compiled=compiled and (cuda or not quick), by_name=typical)
    for tokens in TOKENS[device][: 1 if quick else None]:
        for mode in PASSES:
            for masked in (False, True):
                by_name = not quick and mode != "penalty"
                yield _heads(8 if cuda else 1, tokens, usual, device, mode, masked=masked, by_name=by_name)
    for mode in PASSES:
        yield _projections(batch, *TYPICAL, usual, device, mode, by_name=not quick)


def _impls(device: str, by_name: bool) -> dict[str, str]:
    """fastgan's rows: the default, and with ``by_name`` on a CPU also the extension and the reference by name."""
    by_names = {"fastgan extension": "extension", "fastgan reference": "reference"}
    return {"fastgan": "auto"} | (by_names if by_name and device == "cpu" else {})


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
    by_name: bool,
) -> Workload:
    n, m, d, e = height**2, height**2 // 4, channels // 8, channels // 2
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, rows, width, generator=generator, device=device, dtype=dtype).requires_grad_()
        for rows, width in ((n, d), (m, d), (m, e))
    )
    functions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "eager": attention_eager,
        **{name: functools.partial(attention, impl=impl) for name, impl in _impls(device, by_name).items()},
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
        floor=_floor(batch, n, m, d, e, dtype, device, mode),
    )


def _heads(
    batch: int, tokens: int, dtype: torch.dtype, device: str, mode: str, masked: bool, by_name: bool
) -> Workload:
    """8 heads of 64 channels; on a CPU 4 of 32. ``masked``: a random tenth of all pairs is masked."""
    heads, d = (8, 64) if device == "cuda" else (4, 32)
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, tokens, 3, heads, d)
    qkv = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind())
    mask = None
    if masked:
        mask = torch.rand(batch, 1, tokens, tokens, generator=generator, device=device) > 0.1

    def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = torch.einsum("bhnd,bhmd->bhnm", q, k) * d**-0.5
        if mask is not None:
            maps = maps.masked_fill(~mask, -torch.inf)
        return torch.einsum("bhnm,bhmd->bhnd", torch.softmax(maps, dim=-1), v)

    def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, mask)

        return run

    def own(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, impl=impl)

    functions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "eager": einsum,
        **{name: own(impl) for name, impl in _impls(device, by_name).items()},
        "sdpa math": sdpa(SDPBackend.MATH),
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    if mode != "penalty":  # which torch.compile refuses
        functions["compile"] = torch.compile(einsum, dynamic=False)
    return Workload(
        name=f"{'masked ' * masked}heads {mode}, N={tokens} H={heads} d={d} B={batch} {_short(dtype)}",
        implementations={name: _passes(f, (q, k, v), mode) for name, f in functions.items()},
        reference="eager",
        check=largest_relative_norm,
        parameters={"batch": batch, "tokens": tokens, "heads": heads, "d": d, "dtype": _short(dtype), "mode": mode},
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        floor=_floor(batch * heads, tokens, tokens, d, d, dtype, device, mode),
    )


def _block(
    batch: int, channels: int, height: int, dtype: torch.dtype, device: str, mode: str, compiled: bool, by_name: bool
) -> Workload:
    torch.manual_seed(0)
    fused = SelfAttention2d(channels).to(device, dtype)
    nn.init.constant_(fused.gamma, 0.5)
    eager = EagerAttention(copy.deepcopy(fused))
    x = torch.randn(batch, channels, height, height, device=device, dtype=dtype).requires_grad_()

    def passes(block: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        parameters = [p for name, p in sorted(block.named_parameters())]
        return _passes(lambda x, *_: run(x), (x, *parameters), mode)

    implementations = {"eager": passes(eager, eager)}
    for name, impl in _impls(device, by_name).items():
        block = copy.deepcopy(fused)
        block.impl = impl
        implementations[name] = passes(block, block)
    if compiled:
        implementations["compile"] = passes(eager, torch.compile(eager, dynamic=False))
    n, d, e = height**2, channels // 8, channels // 2
    core = _floor(batch, n, n // 4, d, e, dtype, device, mode)
    return Workload(
        name=f"block {mode}, C={channels} H={height} B={batch} {_short(dtype)}",
        implementations=implementations,
        reference="eager",
        check=largest_relative_norm,
        parameters=_parameters(batch, channels, height, dtype, mode),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        floor=core + _floor_of_projections(batch, channels, n, dtype, device, mode),
    )


def _projections(
    batch: int, channels: int, height: int, dtype: torch.dtype, device: str, mode: str, by_name: bool
) -> Workload:
    """The two kernels on either side of a block's attention: queries with pooled keys and values, and the residual."""
    d, e = channels // 8, channels // 2
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((batch, channels, height, height), (2 * d + e, channels), (batch, height**2, e), (channels, e))
    inputs = tuple(
        torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_() for shape in shapes
    )

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in parts], 1)

    def eager(x: Tensor, weight: Tensor, rows: Tensor, output: Tensor) -> Tensor:
        maps = F.conv2d(x, weight[:, :, None, None])
        q, kv = maps[:, :d], F.max_pool2d(maps[:, d:], 2)
        image = rows.mT.unflatten(2, x.shape[2:])
        return joined(*(y.flatten(2).mT for y in (q, kv)), x + F.conv2d(image, output[:, :, None, None]))

    def own(impl: str) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, rows: Tensor, output: Tensor) -> Tensor:
            q, kv = pooled_projection(x, weight, None, d, impl)
            return joined(q, kv, projection_residual(rows, output, None, x, impl))

        return run

    functions: dict[str, Callable[..., Tensor]] = {"eager": eager}
    functions |= {name: own(impl) for name, impl in _impls(device, by_name).items()}
    return Workload(
        name=f"projections {mode}, C={channels} H={height} B={batch} {_short(dtype)}",
        implementations={name: _passes(f, inputs, mode) for name, f in functions.items()},
        reference="eager",
        check=largest_relative_norm,
        parameters=_parameters(batch, channels, height, dtype, mode),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        floor=_floor_of_projections(batch, channels, height**2, dtype, device, mode),
    )


def _passes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str) -> Callable[[], list[Tensor]]:
    """The output; or the gradients of its sum of squares; or the gradients of a WGAN-GP penalty on the first input."""

    without_gradients = [x.detach() for x in inputs]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*without_gradients)]

    def backward() -> list[Tensor]:
        return list(torch.autograd.grad(function(*inputs).float().square().sum(), inputs))

    # Without this, torch.compile refuses a second gradient because of its donated buffers, not because it has none.
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


def _floor(batch: int, n: int, m: int, d: int, e: int, dtype: torch.dtype, device: str, mode: str) -> float:
    """Seconds for the exponentials, products and bytes of attention, each pass counted once."""
    maps = batch * n * m
    # Products of q, k, v-sized operands with the maps: S and O; then S, dP, dQ, dK, dV; then both passes of the
    # second order. Exponentials: once per map that is kept or recomputed.
    exponentials, with_d, with_e = {"forward": (1, 1, 1), "backward": (3, 4, 4), "penalty": (6, 12, 10)}[mode]
    tensors = {"forward": 1, "backward": 3, "penalty": 6}[mode]
    moved = tensors * batch * ((n + m) * d + (n + m) * e) * dtype.itemsize
    return limits.seconds(device, dtype, 2 * maps * (with_d * d + with_e * e), exponentials * maps, moved)


def _floor_of_projections(batch: int, channels: int, n: int, dtype: torch.dtype, device: str, mode: str) -> float:
    """Seconds for the products and bytes of a block's four projections."""
    # Per layer: the output; then the gradients of input and weight; then those of both gradients; the weight's
    # is needed only with the penalty.
    passes = {"forward": 1, "backward": 3, "penalty": 6}[mode]
    outputs = 2 * (channels // 8) + channels // 2
    products = 2 * batch * n * channels * (outputs + channels // 2)
    moved = batch * n * (2 * channels + outputs + channels // 2) * dtype.itemsize
    return limits.seconds(device, dtype, passes * products, 0, passes * moved)


def _parameters(batch: int, channels: int, height: int, dtype: torch.dtype, mode: str) -> dict[str, Any]:
    return {"batch": batch, "channels": channels, "height": height, "dtype": _short(dtype), "mode": mode}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
