"""Compare TrainStep with plain loops on the networks of public GAN projects, in float64, eager and captured.

Needs checkouts in one folder: ``PyTorch-GAN`` (eriklindernoren), ``mimicry`` (kwotsin) and ``R3GAN`` (brownvc). None of
their code is here; without them ``test_public_loops`` is skipped. Prints the largest difference of any weight::

    FASTGAN_PUBLIC_GANS=/path/to/checkouts python -m tests.training.public_loops
"""

import ast
import importlib
import os
import sys
import types
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.autograd import Variable, grad
from torch.nn import functional as F

from fastgan.losses.penalties import clip_weights_
from fastgan.training import NetworkUpdate, TrainStep

ROOT = Path(os.environ.get("FASTGAN_PUBLIC_GANS", "public-gans"))
STEPS, N = 8, 4
OPTIONS = Namespace(
    latent_dim=16, img_size=32, channels=3, n_classes=5, code_dim=2, clip_value=0.01, lambda_gp=10.0, lambda_pixel=100.0
)


def definitions(path):
    """Classes and functions of a script, without running the rest of it."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    scope = {"torch": torch, "nn": nn, "F": F, "np": np, "opt": OPTIONS, "img_shape": (3, 32, 32), "cuda": False}
    scope |= {"Variable": Variable, "autograd": torch.autograd, "__name__": path.stem}
    exec(compile(tree, str(path), "exec"), scope)
    return scope


def script(name, *file):
    return definitions(ROOT / "PyTorch-GAN" / "implementations" / name / (file[0] if file else f"{name}.py"))


def adam(*modules, lr=2e-4, betas=(0.5, 0.999)):
    return torch.optim.Adam([p for m in modules for p in m.parameters()], lr=lr, betas=betas)


def like(value, logits):
    return torch.full_like(logits, value)


def two(g, d, g_loss, d_loss, make=adam, clip=0.0, order=("g", "d")):
    """Networks, updates and images: the fake batch is generated once for both updates, as these loops do."""
    made = {"g": NetworkUpdate(g_loss, "g", make(g)), "d": NetworkUpdate(d_loss, "d", make(d), clip=clip)}
    return {"g": g, "d": d}, {name: made[name] for name in order}


def bce_pair(name, criterion):
    scope = script(name)
    g, d = scope["Generator"](), scope["Discriminator"]()
    if name in ("dcgan", "lsgan"):
        for network in (g, d):
            network.apply(scope["weights_init_normal"])

    def g_loss(batch, draws):
        logits = d(g(batch["z"]))
        return criterion(logits, like(1.0, logits))

    def d_loss(batch, draws):
        real, fake = d(batch["x"]), d(batch["fake"])
        return (criterion(real, like(1.0, real)) + criterion(fake, like(0.0, fake))) / 2

    return two(g, d, g_loss, d_loss)


def wgan():
    scope = script("wgan")
    g, d = scope["Generator"](), scope["Discriminator"]()
    return two(
        g,
        d,
        lambda b, _: -d(g(b["z"])).mean(),
        lambda b, _: d(b["fake"]).mean() - d(b["x"]).mean(),
        lambda m: torch.optim.RMSprop(m.parameters(), 5e-5),
        clip=OPTIONS.clip_value,
        order=("d", "g"),
    )


def wgan_gp():
    scope = script("wgan_gp")
    g, d = scope["Generator"](), scope["Discriminator"]()

    def d_loss(b, _):
        between = (b["alpha"] * b["x"] + (1 - b["alpha"]) * b["fake"]).requires_grad_(True)
        score = d(between)
        (slope,) = grad(score, between, torch.ones_like(score), create_graph=True, retain_graph=True)
        return d(b["fake"]).mean() - d(b["x"]).mean() + 10 * ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()

    return two(g, d, lambda b, _: -d(g(b["z"])).mean(), d_loss, order=("d", "g"))


def acgan():
    scope = script("acgan")
    g, d = (scope[name]().apply(scope["weights_init_normal"]) for name in ("Generator", "Discriminator"))

    def both(images, label, classes):
        validity, predicted = d(images)
        return 0.5 * (F.binary_cross_entropy(validity, like(label, validity)) + F.cross_entropy(predicted, classes))

    return two(
        g,
        d,
        lambda b, _: both(g(b["z"], b["y"]), 1.0, b["y"]),
        lambda b, _: (both(b["x"], 1.0, b["y"]) + both(b["fake"], 0.0, b["y"])) / 2,
    )


def relativistic():
    scope = script("relativistic_gan")
    g, d = scope["Generator"](), scope["Discriminator"]()
    bce = F.binary_cross_entropy_with_logits

    def g_loss(b, _):
        real, fake = d(b["x"]).detach(), d(g(b["z"]))
        return bce(fake - real.mean(0, keepdim=True), like(1.0, fake))

    def d_loss(b, _):
        real, fake = d(b["x"]), d(b["fake"])
        first = bce(real - fake.mean(0, keepdim=True), like(1.0, real))
        return (first + bce(fake - real.mean(0, keepdim=True), like(0.0, fake))) / 2

    return two(g, d, g_loss, d_loss)


def cyclegan():
    scope = script("cyclegan", "models.py")
    shape = (3, 32, 32)
    ab, ba = (scope["GeneratorResNet"](shape, 1) for _ in range(2))
    da, db = (scope["Discriminator"](shape) for _ in range(2))

    def g_loss(b, _):
        x, y = b["x"], b["fake"]
        fake_y, fake_x = ab(x), ba(y)
        logits = db(fake_y), da(fake_x)
        return {
            "identity": 5 * ((ba(x) - x).abs().mean() + (ab(y) - y).abs().mean()) / 2,
            "adversarial": sum(F.mse_loss(v, like(1.0, v)) for v in logits) / 2,
            "cycle": 10 * ((ba(fake_y) - x).abs().mean() + (ab(fake_x) - y).abs().mean()) / 2,
        }

    def d_loss(d, g, real, source):
        def loss(b, _):
            a, c = d(b[real]), d(g(b[source]).detach())
            return (F.mse_loss(a, like(1.0, a)) + F.mse_loss(c, like(0.0, c))) / 2

        return loss

    updates = {
        "g": NetworkUpdate(g_loss, ["ab", "ba"], adam(ab, ba)),
        "da": NetworkUpdate(d_loss(da, ba, "x", "fake"), "da", adam(da)),
        "db": NetworkUpdate(d_loss(db, ab, "fake", "x"), "db", adam(db)),
    }
    return {"ab": ab, "ba": ba, "da": da, "db": db}, updates


def mimicry(name):
    for package in ("torch_mimicry", "torch_mimicry.nets", f"torch_mimicry.nets.{name}"):  # their __init__ needs more
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(ROOT.joinpath("mimicry", *package.split(".")))]
    nets = importlib.import_module(f"torch_mimicry.nets.{name}.{name}_32")
    classes = {"num_classes": 5} if name == "sagan" else {}
    g, d = (getattr(nets, f"{name.upper()}{kind}32")(**classes) for kind in ("Generator", "Discriminator"))

    def score(images, b):
        return d(images, b["y"])[0] if classes else d(images)

    def d_loss(b, _):
        return F.relu(1 - score(b["x"], b)).mean() + F.relu(1 + score(b["fake"], b)).mean()

    def g_loss(b, _):
        return -score(g(b["z"], b["y"]) if classes else g(b["z"]), b).mean()

    return two(g, d, g_loss, d_loss, lambda m: adam(m, betas=(0.0, 0.9)), order=("d", "g"))


def r3gan():
    sys.path.insert(0, str(ROOT / "R3GAN"))
    package = importlib.import_module("R3GAN.Networks")
    sizes = {"WidthPerStage": [16, 16], "BlocksPerStage": [1, 1], "ExpansionFactor": 2, "KernelSize": 3}
    sizes |= {"CardinalityPerStage": [4, 4], "ResamplingFilter": [1, 2, 1]}
    g, d = package.Generator(16, **sizes), package.Discriminator(**sizes)

    def slope(x, score):
        (gradient,) = grad(score.sum(), x, create_graph=True)
        return gradient.square().sum((1, 2, 3))

    def d_loss(b, _):
        real, fake = (b[k][..., :8, :8].detach().requires_grad_(True) for k in ("x", "fake"))
        a, c = d(real), d(fake)
        return (F.softplus(c - a) + 0.5 * (slope(real, a) + slope(fake, c))).mean()

    def g_loss(b, _):
        return F.softplus(d(b["x"][..., :8, :8]) - d(g(b["z"]))).mean()

    return two(g, d, g_loss, d_loss, lambda m: adam(m, betas=(0.0, 0.99)), order=("d", "g"))


LOOPS = {
    "dcgan": lambda: bce_pair("dcgan", F.binary_cross_entropy),
    "lsgan": lambda: bce_pair("lsgan", F.mse_loss),
    "wgan": wgan,
    "wgan-gp": wgan_gp,
    "acgan": acgan,
    "relativistic": relativistic,
    "cyclegan": cyclegan,
    "sngan": lambda: mimicry("sngan"),
    "sagan": lambda: mimicry("sagan"),
    "r3gan": r3gan,
}


def built(name):
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        networks, updates = LOOPS[name]()
    finally:
        torch.set_default_dtype(before)
    return networks, updates


def batches(name, networks):
    """Batches with the fake images of the generator as it is."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        draws = {
            "x": torch.rand(N, 3, 32, 32, generator=rng, dtype=torch.float64) * 2 - 1,
            "z": torch.randn(N, 128 if name in ("sngan", "sagan") else 16, generator=rng, dtype=torch.float64),
            "y": torch.randint(0, 5, (N,), generator=rng),
            "alpha": torch.rand(N, 1, 1, 1, generator=rng, dtype=torch.float64),
            "fake": torch.rand(N, 3, 32, 32, generator=rng, dtype=torch.float64) * 2 - 1,
        }
        if "g" in networks:
            with torch.no_grad():
                inputs = [draws["z"], draws["y"]] if name in ("acgan", "sagan") else [draws["z"]]
                draws["fake"] = networks["g"](*inputs).detach()
        yield draws


def run(name, mode):
    """Weights and buffers after some steps by a plain loop (``mode`` None) or by TrainStep, and its warnings."""
    networks, updates = built(name)
    torch.manual_seed(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = mode and TrainStep.of_updates(networks, updates, mode=mode, backend="eager")
        for batch in batches(name, networks):
            for key, update in updates.items():
                if step:
                    step.update(key, batch)
                    continue
                for network in networks.values():
                    network.zero_grad()
                loss = update.loss(batch, {})
                (sum(loss.values()) if isinstance(loss, dict) else loss).backward()
                update.optimizer.step()
                if update.clip:
                    clip_weights_(networks[update.trains], update.clip)
    told = [str(w.message) for w in caught if "runs eagerly" in str(w.message)]
    return {f"{n}.{k}": v for n, network in networks.items() for k, v in network.state_dict().items()}, told


def difference(a, b):
    """Largest difference of an entry, in relation to the largest of its tensor."""
    return max(float((a[key] - b[key]).abs().max() / a[key].abs().max().clamp_min(1e-3)) for key in a)


def main():
    for name in sys.argv[1:] or LOOPS:
        expected, _ = run(name, None)
        (eager, _), (captured, told) = run(name, "eager"), run(name, "compile")
        how = f"captured {difference(expected, captured):.1e}"
        print(f"{name:13} eager {difference(expected, eager):.1e}, {how}{', ' + told[0] if told else ''}", flush=True)


if __name__ == "__main__":
    main()
