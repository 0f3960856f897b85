"""Train steps of narrow recipes at 16x16, eager or captured, and the states that they leave."""

from dataclasses import replace

import torch
from torch import nn

from fastgan.data import edge_map
from fastgan.nn import SelfAttention2d
from fastgan.recipes import load_recipe
from fastgan.training import EMA, Objective, RecipeGAN, TrainStep, build_networks
from fastgan.training.step.optimizers import make_optimizer

STEPS = 5
N = 6

# The graph holds the same kernels, so on the "eager" backend only sums of gradients may differ in their order. Inductor
# rounds otherwise within its fused loops; see test_the_effect_of_another_rounding_on_a_step.
TOLERANCE = {"eager": 1e-5, "inductor": 2e-4}
FLOAT64_TOLERANCE = 1e-8

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.5, 0.9), weight_decay=0.1, amsgrad=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.9), fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, weight_decay=0.1, centered=True),
    "rmsprop, plain": lambda p: torch.optim.RMSprop(p, 1e-3),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd, plain": lambda p: torch.optim.SGD(p, 1e-2),
}


class Recording(TrainStep):
    """Keeps the graphs that it compiles."""

    def compile(self, graph, arguments):
        self.__dict__.setdefault("graphs", []).append(graph)
        return super().compile(graph, arguments)


class Setup:
    """A recipe's GAN, narrow and at 16x16, with optimizers and average, in either mode."""

    def __init__(
        self,
        name,
        mode,
        backend="eager",
        device="cpu",
        autocast=None,
        impl="reference",
        eps=1e-3,  # 1e-8 makes full steps of the rounding of gradients that are zero
        layout=torch.channels_last,
        **objective,
    ):
        recipe = load_recipe(name)
        attention = min(recipe.model.attention_resolution, 8)
        small = {"resolution": 16, "generator_width": 8, "discriminator_width": 8, "attention_resolution": attention}
        small["discriminator_dropout"] = 0  # graphs draw its masks in an order of their own
        torch.manual_seed(0)
        networks = build_networks(replace(recipe.model, **small), 3, 1)
        g, d = (network.to(device).to(memory_format=layout) for network in networks)
        for module in (*g.modules(), *d.modules()):
            if isinstance(module, SelfAttention2d):
                nn.init.constant_(module.gamma, 0.5)
                # "reference" is the op, where "auto" would take plain PyTorch for maps as small as these.
                module.impl = impl
        self.optimizer_g = make_optimizer(g, 1e-3, recipe.train)
        self.optimizer_d = make_optimizer(d, 1e-3, recipe.train)
        for group in (*self.optimizer_g.param_groups, *self.optimizer_d.param_groups):
            group["eps"] = eps
        self.ema = EMA(g, 0.9)
        self.gan = RecipeGAN(g, d, replace(Objective.of(recipe.train), **objective), autocast=autocast)
        self.rng = torch.Generator(device).manual_seed(3)
        self.step = Recording(
            self.gan,
            self.optimizer_g,
            self.optimizer_d,
            mode=mode,
            backend=backend,
            ema=self.ema,
            clip=recipe.train.clip,
            rng=self.rng,
        )

    def run(self, steps=STEPS, device="cpu"):
        for k in range(steps):
            self.step.discriminator(batch(k, device=device))
            self.step.generator(batch(k, device=device))
        return self

    def state(self):
        modules = {"g": self.gan.generator, "d": self.gan.discriminator, "ema": self.ema.module}
        state = {f"{n}.{key}": value for n, module in modules.items() for key, value in module.state_dict().items()}
        for name, optimizer in (("optimizer_g", self.optimizer_g), ("optimizer_d", self.optimizer_d)):
            for i, entries in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{i}.{key}": value for key, value in entries.items() if value is not None}
        return state | {"updates": self.ema.updates, "rng": self.rng.get_state()}


def batch(k, n=N, device="cpu"):
    rng = torch.Generator().manual_seed(k)
    images = (torch.rand(n, 1, 16, 16, generator=rng) * 2 - 1).contiguous(memory_format=torch.channels_last)
    made = {"images": images, "labels": torch.arange(n) % 3, "sketches": edge_map(images)}
    return {name: value.to(device) for name, value in made.items()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def moments(optimizers):
    states = [entries for o in optimizers for entries in o.state_dict()["state"].values()]
    return [entries[key] for entries in states for key in sorted(entries) if entries[key] is not None]
