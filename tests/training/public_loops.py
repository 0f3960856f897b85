"""Compare TrainStep with plain loops on the networks of public GAN projects, in float64, eager and captured.

Needs checkouts in one folder: ``PyTorch-GAN`` (eriklindernoren), ``mimicry`` (kwotsin), ``R3GAN`` (brownvc),
``stylegan2-pytorch`` and ``lightweight-gan`` (lucidrains; both need einops and kornia), ``BigGAN-PyTorch`` (ajbrock)
and ``torchgan``. None of their code is here; ``test_public_loops`` skips projects that are missing. Prints the largest
difference of any weight::

    FASTGAN_PUBLIC_GANS=/path/to/checkouts python -m tests.training.public_loops [name ...] [--backend aot_eager]
"""

import ast
import importlib
import os
import sys
import types
import warnings
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from functools import lru_cache, partial
from math import floor, log2
from pathlib import Path
from random import random

import numpy as np
import torch
from torch import nn
from torch.autograd import Variable, grad
from torch.nn import functional as F

from fastgan.backend import warn_anew
from fastgan.losses.penalties import clip_weights_
from fastgan.training import LazyTerm, NetworkUpdate, TrainStep

ROOT = Path(os.environ.get("FASTGAN_PUBLIC_GANS", "public-gans"))
STEPS, N = 8, 4
OPTIONS = Namespace(
    latent_dim=16, img_size=32, channels=3, n_classes=5, code_dim=2, clip_value=0.01, lambda_gp=10.0, lambda_pixel=100.0
)


def definitions(path, **imports):
    """Classes and functions of a script, without running the rest of it."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if _defines(node)]
    scope = {"torch": torch, "nn": nn, "F": F, "np": np, "opt": OPTIONS, "img_shape": (3, 32, 32), "cuda": False}
    scope |= {"Variable": Variable, "autograd": torch.autograd, "__name__": path.stem, **imports}
    exec(compile(tree, str(path), "exec"), scope)
    return scope


def _defines(node):
    is_lambda = isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
    return isinstance(node, (ast.ClassDef, ast.FunctionDef)) or is_lambda


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


def without_init(project, *packages):
    """Make packages importable without their ``__init__``, which needs more than their modules do."""
    for package in packages:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(ROOT.joinpath(project, *package.split(".")))]


def mimicry(name):
    without_init("mimicry", "torch_mimicry", "torch_mimicry.nets", f"torch_mimicry.nets.{name}")
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


def pix2pix():
    scope = script("pix2pix", "models.py")
    down, up = scope["UNetDown"], scope["UNetUp"]

    class UNet(nn.Module):
        """The project's U-net has 8 levels, this one has 3; its last fake image stays in a buffer, for both updates."""

        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList([down(3, 8, normalize=False), *(down(n, 16, dropout=0.5) for n in (8, 16))])
            self.up = nn.ModuleList([up(16, 16, dropout=0.5), up(32, 8)])
            self.final = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh())
            self.register_buffer("fake", torch.zeros(N, 3, 32, 32))

        def forward(self, x):
            first = self.down[0](x)
            second = self.down[1](first)
            fake = self.final(self.up[1](self.up[0](self.down[2](second), second), first))
            self.fake.copy_(fake.detach())
            return fake

    g, d = UNet(), scope["Discriminator"]()
    for network in (g, d):
        network.apply(scope["weights_init_normal"])

    def g_loss(b, _):
        fake = g(b["fake"])
        logits = d(fake, b["fake"])
        return {"gan": F.mse_loss(logits, like(1.0, logits)), "pixel": OPTIONS.lambda_pixel * F.l1_loss(fake, b["x"])}

    def d_loss(b, _):
        real, fake = d(b["x"], b["fake"]), d(g.fake, b["fake"])
        return 0.5 * (F.mse_loss(real, like(1.0, real)) + F.mse_loss(fake, like(0.0, fake)))

    made = {"generator": NetworkUpdate(g_loss, "generator", adam(g)), "d": NetworkUpdate(d_loss, "d", adam(d))}
    return {"generator": g, "d": d}, made


def infogan():
    """Three optimizers: that of the information loss has all weights of both networks, as in the project."""
    scope = script("infogan")
    g, d = (scope[name]().apply(scope["weights_init_normal"]) for name in ("Generator", "Discriminator"))

    def generated(b):
        return g(b["z"], F.one_hot(b["y"], OPTIONS.n_classes).to(b["z"].dtype), b["code"])

    def g_loss(b, _):
        validity = d(generated(b))[0]
        return F.mse_loss(validity, like(1.0, validity))

    def d_loss(b, _):
        real, fake = d(b["x"])[0], d(generated(b).detach())[0]
        return (F.mse_loss(real, like(1.0, real)) + F.mse_loss(fake, like(0.0, fake))) / 2

    def info_loss(b, _):
        _, label, code = d(generated(b))
        return F.cross_entropy(label, b["y"]) + 0.1 * F.mse_loss(code, b["code"])

    updates = {
        "generator": NetworkUpdate(g_loss, "generator", adam(g)),
        "d": NetworkUpdate(d_loss, "d", adam(d)),
        "info": NetworkUpdate(info_loss, ["generator", "d"], adam(g, d), shares_weights=True),
    }
    return {"generator": g, "d": d}, updates


def torchgan():
    """Spectral norm that sets the data of parameters, self-attention, minibatch discrimination; DRAGAN's penalty."""
    without_init("torchgan", "torchgan")
    layers, losses, models = (importlib.import_module(f"torchgan.{name}") for name in ("layers", "losses", "models"))
    g = models.DCGANGenerator(16, out_size=32, step_channels=8)
    d = nn.Sequential(
        *(layers.SpectralNorm2d(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2), layers.SelfAttention2d(8)),
        *(layers.SpectralNorm2d(nn.Conv2d(8, 8, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten()),
        *(layers.MinibatchDiscrimination1d(512, 4), nn.Linear(516, 1), nn.Flatten(0)),
    )
    pair = losses.LeastSquaresGeneratorLoss(), losses.LeastSquaresDiscriminatorLoss()
    penalty = losses.DraganGradientPenalty()

    def d_loss(b, _):
        alpha, beta = (torch.rand(b["x"].shape, dtype=b["x"].dtype, requires_grad=True) for _ in range(2))
        between = b["x"] + (1 - alpha) * 0.5 * b["x"].std() * beta
        return {"pair": pair[1](d(b["x"]), d(b["fake"])), "penalty": penalty.lambd * penalty(between, d(between))}

    return two(g, d, lambda b, _: pair[0](d(g(b["z"]))), d_loss, order=("d", "g"))


def r3gan():
    sys.modules.setdefault("pkg_resources", types.ModuleType("pkg_resources"))  # no longer in setuptools
    sys.modules["pkg_resources"].parse_version = torch.torch_version.TorchVersion
    sys.path.insert(0, str(ROOT / "R3GAN"))
    package, trainer = (importlib.import_module(f"R3GAN.{name}") for name in ("Networks", "Trainer"))
    sizes = {"WidthPerStage": [16, 16], "BlocksPerStage": [1, 1], "ExpansionFactor": 2, "KernelSize": 3}
    sizes |= {"CardinalityPerStage": [4, 4], "ResamplingFilter": [1, 2, 1]}
    g, d = package.Generator(16, **sizes), package.Discriminator(**sizes)
    for stage in (*g.MainLayers, *d.MainLayers):
        stage.DataType = torch.float64
    for module in (*g.modules(), *d.modules()):
        if hasattr(module, "Kernel"):
            module.Kernel = module.Kernel.float()  # as its op wants it
    optimizers = {name: adam(m, betas=(0.0, 0.99)) for name, m in (("g", g), ("d", d))}
    training = trainer.AdversarialTraining(g, d)
    slope = training.ZeroCenteredGradientPenalty

    def d_loss(b, _):
        real, fake = (images.detach().requires_grad_(True) for images in (b["x"][..., :8, :8], g(b["z"])))
        a, c = d(real), d(fake)
        return {"rpgan": F.softplus(c - a).mean(), "r1": slope(real, a).mean() / 2, "r2": slope(fake, c).mean() / 2}

    def g_loss(b, _):
        return F.softplus(d(b["x"][..., :8, :8]) - d(g(b["z"]))).mean()

    def plain(_, b):
        training.AccumulateDiscriminatorGradients(b["z"], b["x"][..., :8, :8], None, Gamma=1)
        optimizers["d"].step()
        g.zero_grad()
        training.AccumulateGeneratorGradients(b["z"], b["x"][..., :8, :8], None)
        optimizers["g"].step()
        d.zero_grad()
        g.zero_grad()

    updates = {"d": NetworkUpdate(d_loss, "d", optimizers["d"]), "g": NetworkUpdate(g_loss, "g", optimizers["g"])}
    return {"g": g, "d": d}, updates, plain


def lucidrains(name, **more):
    """Return the definitions in a script of this author, with attention of a few small heads."""
    einops, kornia = importlib.import_module("einops"), importlib.import_module("kornia")
    imports = {name: getattr(einops, name) for name in ("rearrange", "reduce", "repeat")} | {"torch_grad": grad}
    imports |= {"filter2d": kornia.filters.filter2d, "einsum": torch.einsum, "math": importlib.import_module("math")}
    imports |= {"partial": partial, "log2": log2, "floor": floor, "random": random, "contextmanager": contextmanager}
    imports |= {"data": torch.utils.data, "Dataset": torch.utils.data.Dataset, "lru_cache": lru_cache, **more}
    package = name.replace("-", "_")
    scope = definitions(ROOT / name / package / f"{package}.py", **imports)
    scope["LinearAttention"].__init__.__defaults__ = (8, 2, 3)[: len(scope["LinearAttention"].__init__.__defaults__)]
    return scope


class PathLengths(nn.Module):
    """Squared distance of path lengths from their moving mean, which the first call sets."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, lengths):
        known, old = self.mean > 0, self.mean.clone()
        average = lengths.detach().mean()
        self.mean.copy_(torch.where(known, 0.99 * old + 0.01 * average, average))
        return known * (lengths - old).square().mean()


def stylegan2():
    """The project has the gradient penalty in every 4th step and path lengths in every 32nd; here in every 2nd."""
    scope = lucidrains("stylegan2-pytorch")
    sizes = {"network_capacity": 2, "attn_layers": [1]}
    mapping, lengths = scope["StyleVectorizer"](16, 2), PathLengths()
    g, d = scope["Generator"](16, 16, **sizes), scope["Discriminator"](16, **sizes)
    optimizers = {name: adam(*m, betas=(0.5, 0.9)) for name, m in (("g", (g, mapping)), ("d", (d,)))}
    every = {"gp": 4, "path": 2}

    def generated(b):
        """Styles and images; layers from number y on have the style of another sample."""
        layers = torch.arange(g.num_layers)[:, None] < b["y"][:, None, None]
        styles = torch.where(layers, mapping(b["z"])[:, None], mapping(b["z"].flip(0))[:, None])
        return styles, g(styles, b["noise"][:, :16, :16])

    def penalty(images, weight):
        images = images.detach().requires_grad_(True)
        return scope["gradient_penalty"](images, d(images)[0], weight)

    def d_loss(b, _):
        return scope["hinge_loss"](d(generated(b)[1].detach())[0], d(b["x"][..., :16, :16])[0])

    def gp(b, _):
        weight = 10 / every["gp"]
        return penalty(b["x"][..., :16, :16], weight) + penalty(generated(b)[1], weight)

    def g_loss(b, _):
        return scope["gen_hinge_loss"](d(generated(b)[1])[0], None)

    def path(b, _):
        return lengths(scope["calc_pl_lengths"](*generated(b))) / every["path"]

    mean, average = None, scope["EMA"](0.99)

    def plain(i, b):
        nonlocal mean
        _, fake = generated(b)
        fake, real = fake.detach().requires_grad_(True), b["x"][..., :16, :16].detach().requires_grad_(True)
        fake_logits, real_logits = d(fake)[0], d(real)[0]
        loss = scope["hinge_loss"](fake_logits, real_logits)
        if i % every["gp"] == 0:
            loss = loss + scope["gradient_penalty"](real, real_logits) + scope["gradient_penalty"](fake, fake_logits)
        optimizers["d"].zero_grad()
        loss.backward()
        optimizers["d"].step()
        styles, fake = generated(b)
        loss = scope["gen_hinge_loss"](d(fake)[0], None)
        if i % every["path"] == 0:
            found = scope["calc_pl_lengths"](styles, fake)
            if mean is not None:
                loss = loss + ((found - mean) ** 2).mean()
            mean = average.update_average(mean, found.mean().item())
            lengths.mean.fill_(mean)
        optimizers["g"].zero_grad()
        loss.backward()
        optimizers["g"].step()

    updates = {
        "d": NetworkUpdate(d_loss, "d", optimizers["d"], lazy={"gp": LazyTerm(gp, every["gp"])}),
        "g": NetworkUpdate(g_loss, ["generator", "s"], optimizers["g"], lazy={"path": LazyTerm(path, every["path"])}),
    }
    return {"generator": g, "s": mapping, "d": d, "lengths": lengths}, updates, plain


def lightweight():
    """Noise comes from torch.randn in the generator; the gradient penalty in every 4th step, as in the project."""
    rearrange = importlib.import_module("einops.layers.torch").Rearrange
    scope = lucidrains("lightweight-gan", norm_class=nn.BatchNorm2d, Rearrange=rearrange)
    g = scope["Generator"](image_size=32, latent_dim=16, fmap_max=16, attn_res_layers=[8])
    d = scope["Discriminator"](image_size=32, fmap_max=16, attn_res_layers=[16])
    for module in g.modules():
        if type(module) is scope["Noise"]:
            nn.init.ones_(module.weight)
    optimizers = {name: adam(m, betas=(0.5, 0.9)) for name, m in (("g", g), ("d", d))}

    def d_loss(b, _):
        with torch.no_grad():
            fake = g(b["z"])
        (c, c_small, _), (a, a_small, auxiliary) = d(fake), d(b["x"], calc_aux_loss=True)
        hinge = scope["hinge_loss"]
        return {"global": hinge(a, c), "small": hinge(a_small, c_small), "auxiliary": auxiliary}

    def slopes(images):
        images = images.detach().requires_grad_(True)
        logits = d(images)[:2]
        return grad(logits, images, [torch.ones_like(x) for x in logits], create_graph=True)[0].flatten(1)

    def gp(b, _):
        gradients = torch.cat([slopes(b["x"]), slopes(b["fake"])])
        return 10 / 4 * gradients.norm(2, dim=1).square().mean()

    def g_loss(b, _):
        logits = d(g(b["z"]))
        return {"global": logits[0].mean(), "small": logits[1].mean()}

    def plain(i, b):
        for name, loss in (("d", d_loss), ("g", g_loss)):
            terms = loss(b, {})
            if name == "d" and i % 4 == 0:
                terms["gp"] = 4 * gp(b, {})
            optimizers[name].zero_grad()
            sum(terms.values()).backward()
            optimizers[name].step()

    updates = {
        "d": NetworkUpdate(d_loss, "d", optimizers["d"], lazy={"gp": LazyTerm(gp, 4)}),
        "g": NetworkUpdate(g_loss, "g", optimizers["g"]),
    }
    return {"g": g, "d": d}, updates, plain


def biggan():
    """Fake and real images go through one network of both, in two micro-batches per update."""
    sys.path.insert(0, str(ROOT / "BigGAN-PyTorch"))
    package, losses = importlib.import_module("BigGAN"), importlib.import_module("losses")
    sizes = {"resolution": 32, "n_classes": 5, "G_attn": "16", "D_attn": "16", "hier": True, "shared_dim": 8}
    g = package.Generator(4, dim_z=16, **sizes)
    d = package.Discriminator(4, **sizes)
    both = package.G_D(g, d)

    def d_loss(b, _):
        fake, real = both(b["z"], b["y"], b["x"], b["y"].flip(0), train_G=False)
        return dict(zip(("real", "fake"), losses.discriminator_loss(fake, real), strict=True))

    def g_loss(b, _):
        return losses.generator_loss(both(b["z"], b["y"], train_G=True))

    def plain(_, b):
        for network, loss in ((d, d_loss), (g, g_loss)):
            network.optim.zero_grad()
            for part in ({key: value[half] for key, value in b.items()} for half in (slice(2), slice(2, 4))):
                terms = loss(part, {})
                ((sum(terms.values()) if isinstance(terms, dict) else terms) / 2).backward()
            network.optim.step()

    updates = {"d": NetworkUpdate(d_loss, "d", d.optim, accumulate=2)}
    updates["g"] = NetworkUpdate(g_loss, "generator", g.optim, accumulate=2)
    return {"generator": g, "d": d}, updates, plain


PROJECTS = {
    "PyTorch-GAN": {
        "dcgan": lambda: bce_pair("dcgan", F.binary_cross_entropy),
        "lsgan": lambda: bce_pair("lsgan", F.mse_loss),
        "wgan": wgan,
        "wgan-gp": wgan_gp,
        "acgan": acgan,
        "relativistic": relativistic,
        "cyclegan": cyclegan,
        "pix2pix": pix2pix,
        "infogan": infogan,
    },
    "mimicry": {"sngan": lambda: mimicry("sngan"), "sagan": lambda: mimicry("sagan")},
    "R3GAN": {"r3gan": r3gan},
    "stylegan2-pytorch": {"stylegan2": stylegan2},
    "lightweight-gan": {"lightweight-gan": lightweight},
    "BigGAN-PyTorch": {"biggan": biggan},
    "torchgan": {"torchgan": torchgan},
}
LOOPS = {name: loop for loops in PROJECTS.values() for name, loop in loops.items()}


def built(name):
    """Networks, updates, and a plain step on a batch if the case has one of its own."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        networks, updates, *plain = LOOPS[name]()
    finally:
        torch.set_default_dtype(before)
    return networks, updates, plain[0] if plain else None


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
            "noise": torch.rand(N, 32, 32, 1, generator=rng, dtype=torch.float64),
            "code": torch.rand(N, 2, generator=rng, dtype=torch.float64) * 2 - 1,
        }
        if "g" in networks:
            with torch.no_grad():
                inputs = [draws["z"], draws["y"]] if name in ("acgan", "sagan") else [draws["z"]]
                draws["fake"] = networks["g"](*inputs).detach()
        yield draws


def run(name, mode, backend="eager"):
    """Run some steps by a plain loop (``mode`` None) or by TrainStep.

    Returns weights and buffers, the warnings that a step runs eagerly, and the number of graphs.
    """
    networks, updates, plain = built(name)
    warn_anew.cache_clear()
    torch.manual_seed(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = mode and TrainStep.of_updates(networks, updates, mode=mode, backend=backend)
        for i, batch in enumerate(batches(name, networks)):
            if plain and not step:
                plain(i, batch)
                continue
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
    left = {f"{n}.{k}": v for n, network in networks.items() for k, v in network.state_dict().items()}
    return left, told, step.compilations if step else 0


def difference(a, b):
    """Largest difference of an entry, in relation to the largest of its tensor."""
    return max(float((a[key] - b[key]).abs().max() / a[key].abs().max().clamp_min(1e-3)) for key in a)


def main():
    parser = ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(LOOPS))
    parser.add_argument("--backend", default="eager")
    options = parser.parse_args()
    for name in options.names:
        expected, *_ = run(name, None)
        eager, *_ = run(name, "eager")
        captured, told, graphs = run(name, "compile", options.backend)
        print(
            f"{name:15} eager {difference(expected, eager):.1e}, captured {difference(expected, captured):.1e} "
            f"in {graphs} graphs{''.join(f', {line}' for line in told)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
