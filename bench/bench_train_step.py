"""Updates of discriminator and generator: PyTorch's layers and loop, its compiler on the modules, fastgan captured.

Every call is one update on the same batch, noise and weights: learning rates are zero, and the orthogonal weights stay
at the singular vectors that they start with. So the gradients of all implementations can be compared at every call,
while every kernel of an update runs. The networks are the recipes', on a CPU narrower and with fewer images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastgan.bench import Workload, relative_norm
from fastgan.bench.eager_attention import EagerAttention
from fastgan.nn import SelfAttention2d, group_spectral_norm
from fastgan.recipes import load_recipe
from fastgan.training import EMA, Objective, RecipeGAN, TrainStep, build_networks
from fastgan.training.step.capture import Fit
from fastgan.training.step.eager import Update

CLASSES = 10
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)
REFERENCE = "torch layers, eager"


@dataclass(frozen=True)
class Case:
    """A recipe at a size.

    Args:
        recipe: its name.
        resolution: height and width of the images.
        penalty: with a gradient penalty of weight 10.
        bf16: under autocast.
        width: channels at full resolution; 0 for the recipe's.
        batch: real images an update.
        compiled: the compiled variants to measure: all, "captured" (no ``torch.compile`` of the modules), or "none".
            Inductor takes a second or two for each of a network's many C++ kernels.
    """

    recipe: str
    resolution: int
    penalty: bool = False
    bf16: bool = False
    width: int = 0
    batch: int = 64
    compiled: str = "all"

    def __str__(self) -> str:
        options = [", gradient penalty"] * self.penalty + [", bf16"] * self.bf16
        return f"{self.recipe} {self.resolution}x{self.resolution}{''.join(options)}"


GPU = [
    *(Case("sagan", 32, penalty, bf16) for penalty in (False, True) for bf16 in (False, True)),
    *(Case("dcgan", 32, bf16=bf16) for bf16 in (False, True)),
    *(Case("wgan-gp", 32, penalty=True, bf16=bf16) for bf16 in (False, True)),
    *(Case("sagan", 64, penalty, bf16) for penalty in (False, True) for bf16 in (False, True)),
    *(Case("sagan", 128, penalty, bf16, batch=32) for penalty in (False, True) for bf16 in (False, True)),
]
CPU = [
    Case("dcgan", 32, width=16, batch=16),
    Case("dcgan", 32, bf16=True, width=16, batch=16, compiled="none"),
    Case("wgan-gp", 32, penalty=True, width=16, batch=16, compiled="captured"),
    Case("sagan", 32, width=16, batch=16, compiled="captured"),
    Case("sagan", 32, penalty=True, width=16, batch=16, compiled="none"),
    Case("sagan", 64, width=16, batch=8, compiled="none"),
    Case("sagan", 128, width=8, batch=4, compiled="none"),
]
QUICK = [Case("dcgan", 16, width=8, batch=8, compiled="captured")]


def workloads(quick: bool, device: str) -> Iterator[Workload]:
    """The updates of each network for every case; on a CPU only narrow networks."""
    for case in QUICK if quick else GPU if device == "cuda" else CPU:
        implementations = {name: functools.cache(make) for name, make in _variants(case, device).items()}
        for network in ("discriminator", "generator"):
            yield Workload(
                name=f"{case}, {network}",
                implementations={
                    name: functools.partial(_update, make, network) for name, make in implementations.items()
                },
                reference=REFERENCE,
                check=_difference,
                parameters={
                    "device": device,
                    "batch": case.batch,
                    "width": case.width or load_recipe(case.recipe).model.generator_width,
                    "dtype": "bfloat16" if case.bf16 else "float32",
                },
                tolerance=0.2 if case.bf16 else 1e-3,
                images=case.batch if network == "discriminator" else None,
            )
    if not quick:
        for name in ("discriminator", "generator"):
            yield Workload(
                name=f"guards of a captured step, sagan 128x128 with biggan-128's widths, {name}",
                implementations={"fastgan": _guards(name, device)},
                reference="fastgan",
                check=lambda misfit, _: float(misfit is not None),
                parameters={"device": device},
            )


def _guards(name: str, device: str) -> Callable[[], str | None]:
    """The check before each captured update, which compares everything that the graph may hold."""

    @functools.cache
    def fit() -> tuple[Fit, dict[str, Tensor]]:
        case = Case("sagan", 128, width=96, batch=2)
        generator, discriminator = (network.to(device) for network in _networks(case, "fastgan"))
        gan = RecipeGAN(generator, discriminator, Objective.of(load_recipe(case.recipe).train))
        trained = generator if name == "generator" else discriminator
        update = Update.of_gan(gan, name, torch.optim.Adam(trained.parameters()), ema=None)
        batch = _batch(case, device)
        return Fit(update, batch), batch

    def misfit() -> str | None:
        kept, batch = fit()
        return kept.misfit(batch)

    return misfit


def _variants(case: Case, device: str) -> dict[str, Callable[[], _Updates]]:
    make = functools.partial(_Updates, case, device)
    variants: dict[str, Callable[[], _Updates]] = {
        REFERENCE: functools.partial(make, layers="torch"),
        "fastgan layers, eager": make,
    }
    if case.compiled == "all":
        variants["torch layers, torch.compile"] = functools.partial(make, layers="torch", compiled_modules=True)
    if case.compiled != "none":
        variants["fastgan, captured"] = functools.partial(make, mode="compile")
    if device == "cuda":
        variants["fastgan, CUDA graph"] = functools.partial(make, mode="cudagraph")
    return variants


def _update(make: Callable[[], _Updates], network: str) -> list[Tensor]:
    return make().update(network)


class _Updates:
    """Networks of a case and one way to update them."""

    def __init__(
        self, case: Case, device: str, *, layers: str = "fastgan", compiled_modules: bool = False, mode: str = "eager"
    ) -> None:
        recipe = load_recipe(case.recipe)
        generator, discriminator = _networks(case, layers)
        networks = [n.to(device).to(memory_format=torch.channels_last) for n in (generator, discriminator)]
        self.optimizers = [torch.optim.Adam(n.parameters(), 0.0, (0.0, 0.9), eps=1e-3) for n in networks]
        ema = EMA(networks[0], recipe.train.ema_decay)
        called: list[Any] = [torch.compile(n) for n in networks] if compiled_modules else networks
        objective = replace(Objective.of(recipe.train), gradient_penalty=10.0 if case.penalty else 0.0)
        gan = RecipeGAN(called[0], called[1], objective, autocast=torch.bfloat16 if case.bf16 else None)
        self.rng = torch.Generator(device)
        self.step = TrainStep(gan, *self.optimizers, mode=mode, ema=ema, rng=self.rng)
        self.batch = _batch(case, device)

    def update(self, network: str) -> list[Tensor]:
        """One update; the terms of the loss, and Adam's first moments, which with a beta of zero are the gradients."""
        self.rng.manual_seed(0)
        losses = getattr(self.step, network)(self.batch)
        optimizer = self.optimizers[network == "discriminator"]
        return [*losses.values(), *(entry["exp_avg"] for entry in optimizer.state.values())]


def _networks(case: Case, layers: str) -> tuple[nn.Module, nn.Module]:
    """The recipe's networks with fastgan's layers or with PyTorch's only, with equal weights."""
    model = load_recipe(case.recipe).model
    normed = [model.generator_spectral_norm, model.discriminator_norm == "spectral"]
    size: dict[str, Any] = {"resolution": case.resolution}
    if case.width:
        size |= {"generator_width": case.width, "discriminator_width": case.width}
    if model.attention_resolution:
        size["attention_resolution"] = case.resolution // 2
    size |= {"generator_spectral_norm": False}
    if model.discriminator_norm == "spectral":
        size["discriminator_norm"] = "none"
    torch.manual_seed(0)
    networks = build_networks(replace(model, **size), CLASSES, 3)
    for network, is_normed in zip(networks, normed, strict=True):
        for module in network.modules():
            if isinstance(module, SelfAttention2d):
                nn.init.constant_(module.gamma, 0.5)
        if layers == "torch":
            _replace_attention(network)
        if is_normed and layers == "torch":
            for module in [m for m in network.modules() if isinstance(m, LAYERS)]:
                parametrizations.spectral_norm(module)
        elif is_normed:
            group_spectral_norm(network)
    return networks


def _replace_attention(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SelfAttention2d):
                setattr(module, name, EagerAttention(child))


def _batch(case: Case, device: str) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(case.batch, 3, case.resolution, case.resolution, generator=rng) * 2 - 1
    labels = torch.arange(case.batch) % CLASSES
    return {"images": images.to(device, memory_format=torch.channels_last), "labels": labels.to(device)}


def _difference(result: list[Tensor], reference: list[Tensor]) -> float:
    """Distance of all gradients and losses together, relative to their size."""
    return relative_norm(*(torch.cat([x.detach().reshape(-1) for x in values]) for values in (result, reference)))
