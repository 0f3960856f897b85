"""``fuse`` over generators, discriminators and blocks of published packages, each compared with the original.

``python -m tests.nn.fusion.public_models > docs/fused_models.md`` writes the table of the documents. A package that is
not installed is left out; ``pip install --no-deps`` of it is enough, as what it imports beyond torch is replaced by
empty modules where it is missing. deoldify brings the fastai 1 that it uses.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.machinery
import importlib.util
import io
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastgan.nn import FuseReport, fuse, unfuse

CHECKS = (
    "forward",
    "gradient",
    "penalty",
    "3 steps",
    "eval",
    "state dict",
    "deepcopy",
    "unfuse",
    "compile",
)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class _Missing(types.ModuleType):
    """An empty module whose every attribute is a class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *_args, **_kwargs: None})


class _Missings:
    """Finds modules of some packages as empty ones."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Missing(spec.name)

    def exec_module(self, _module: Any) -> None:
        pass


def module(name: str) -> Any:
    """Import a module of a package even if packages are missing that its networks do not need, and without a GPU."""
    finder: Any = _Missings()
    sys.meta_path.append(finder)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch("torch.cuda.is_available", return_value=True),  # some assert it when they are imported
        ):
            warnings.simplefilter("ignore")
            while True:
                try:
                    return importlib.import_module(name)
                except ModuleNotFoundError as error:
                    missing = (error.name or "").partition(".")[0]
                    if not missing or missing in finder.packages or missing == name.partition(".")[0]:
                        raise
                    finder.packages.add(missing)
                    for loaded in [n for n in sys.modules if n.partition(".")[0] == name.partition(".")[0]]:
                        del sys.modules[loaded]
    finally:
        sys.meta_path.remove(finder)
        for loaded in [n for n in sys.modules if n.partition(".")[0] in finder.packages]:
            del sys.modules[loaded]


def without_its_imports(package: str) -> None:
    """Let modules of ``package`` be imported without running its ``__init__``."""
    spec = importlib.util.find_spec(package)
    if package not in sys.modules and spec is not None:
        bare: Any = types.ModuleType(package)
        bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations or ())
        sys.modules[package] = bare


@dataclass(frozen=True)
class Case:
    """One network of a package: ``make`` gives it and the arguments of a call."""

    package: str
    name: str
    make: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    swapped: dict[str, int] = field(default_factory=dict)  # kinds of parts, counted
    refused: int = 0

    @property
    def installed(self) -> bool:
        try:
            metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return False
        return True


OLDER, WRAPPER = "torch.nn.utils.spectral_norm", "module that wraps a layer for its spectral norm"
STORED, ATTENTION = "spectral norm in sn_weights with sn_u", "self-attention block"
PARAMETRIZATION = "torch.nn.utils.parametrizations.spectral_norm"


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


def _mimicry(path: str, *arguments: Any, **sizes: Any) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        without_its_imports("torch_mimicry")  # tensorflow, for metrics
        name, _, cls = path.rpartition(".")
        return getattr(module(f"torch_mimicry.nets.{name}"), cls)(**sizes), tuple(arguments)

    return make


def _mimicry_layers() -> tuple[nn.Module, tuple[Any, ...]]:
    without_its_imports("torch_mimicry")
    layers = module("torch_mimicry.modules.spectral_norm")
    network = nn.Sequential(layers.SNConv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), layers.SNLinear(8 * 36, 2))
    return network, (images(8),)


def _biggan() -> tuple[nn.Module, tuple[Any, ...]]:
    package = module("pytorch_pretrained_biggan.model")
    layers = [(False, 16, 16), (True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)]
    sizes = {"z_dim": 8, "class_embed_dim": 8, "channel_width": 8, "num_classes": 10, "n_stats": 3}
    config = package.BigGANConfig(32, layers=layers, attention_layer_position=3, **sizes)
    network = package.BigGAN(config)
    nn.init.ones_(network.generator.bn.weight)  # the package leaves both to the checkpoint that it downloads
    nn.init.zeros_(network.generator.bn.bias)
    return network, (torch.randn(2, 8), torch.eye(10)[:2], 0.5)


def _torchgan() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = module("torchgan.layers")
    norm = layers.SpectralNorm2d
    network = nn.Sequential(norm(nn.Conv2d(3, 16, 3)), layers.SelfAttention2d(16), norm(nn.Conv2d(16, 4, 3)))
    return network, (images(12),)


def _attn_gan(kind: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        layers, networks = module("attn_gan_pytorch.CustomLayers"), module("attn_gan_pytorch.Networks")

        class First(nn.Module):
            """The features of a block that returns its map too."""

            def __init__(self) -> None:
                super().__init__()
                self.block = layers.SelfAttention(16)

            def forward(self, x: Tensor) -> Tensor:
                return self.block(x)[0]

        norm = layers.SpectralNorm
        if kind == "Generator":
            first = norm(nn.ConvTranspose2d(8, 16, 4))
            return networks.Generator([first, First(), norm(nn.Conv2d(16, 3, 1))], 8), (torch.randn(2, 8, 1, 1),)
        return networks.Discriminator([norm(nn.Conv2d(3, 16, 3)), First(), norm(nn.Conv2d(16, 1, 3))]), (images(12),)

    return make


def _fastai(kind: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        layers = module("fastai.layers")
        return nn.Sequential(nn.Conv2d(3, 32, 1), getattr(layers, kind)(32)), (images(8),)

    return make


def _fastai_conv_layer() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = module("fastai.layers")
    spectral = layers.NormType.Spectral
    network = nn.Sequential(
        layers.conv_layer(3, 16, norm_type=spectral, self_attention=True), layers.conv_layer(16, 3, norm_type=spectral)
    )
    return network, (images(8),)


def _deoldify() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = module("deoldify.layers")
    spectral = module("fastai.layers").NormType.Spectral
    network = nn.Sequential(
        layers.custom_conv_layer(3, 16, norm_type=spectral, self_attention=True, extra_bn=True),
        layers.custom_conv_layer(16, 3, norm_type=spectral),
    )
    return network, (images(8),)


def _taming(kind: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        if kind == "NLayerDiscriminator":
            return module("taming.modules.discriminator.model").NLayerDiscriminator(3, 8, 2), (images(),)
        model = module("taming.modules.diffusionmodules.model")
        sizes = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}
        sizes |= {"in_channels": 3, "out_ch": 3, "resolution": 16, "z_channels": 4}
        if kind == "Encoder":
            return model.Encoder(**sizes, double_z=False), (images(16),)
        return model.Decoder(**sizes), (torch.randn(2, 4, 8, 8),)

    return make


def _stylegan2(kind: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        package = module("stylegan2_pytorch.stylegan2_pytorch")
        if kind == "Generator":
            network = package.Generator(16, 8, network_capacity=2, attn_layers=[1, 2])
            return network, (torch.randn(2, network.num_layers, 8), torch.rand(2, 16, 16, 1))
        return package.Discriminator(16, network_capacity=2, attn_layers=[1, 2]), (images(16),)

    return make


def _unet_stylegan2(kind: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        package = module("unet_stylegan2.unet_stylegan2")
        if kind == "Generator":
            network = package.Generator(16, 8, network_capacity=2)
            return network, (torch.randn(2, network.num_layers, 8), torch.rand(2, 16, 16, 1))
        return package.Discriminator(32, network_capacity=2), (images(32),)

    return make


def _lightweight(kind: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        package = module("lightweight_gan.lightweight_gan")
        sizes = {"image_size": 64, "fmap_max": 8, "attn_res_layers": [32]}
        if kind == "Generator":
            return package.Generator(**sizes, latent_dim=8), (torch.randn(2, 8),)
        return package.Discriminator(**sizes, disc_output_size=1), (images(64),)

    return make


def _pro_gan() -> tuple[nn.Module, tuple[Any, ...]]:
    """The discriminator: the generator's layers do not run under torch 2."""
    return module("pro_gan_pytorch.networks").Discriminator(depth=2, latent_size=8), (images(8), 2, 1.0)


def _diffusers(kind: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        models = module("diffusers.models.autoencoders.vae")
        if kind == "Encoder":
            blocks = ("DownEncoderBlock2D",)
            network = models.Encoder(3, 4, blocks, block_out_channels=(32,), layers_per_block=1, double_z=False)
            return network, (images(8),)
        blocks = ("UpDecoderBlock2D",)
        network = models.Decoder(4, 3, blocks, block_out_channels=(32,), layers_per_block=1)
        return network, (torch.randn(2, 4, 8, 8),)

    return make


def _timm(path: str, *arguments: Any) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        name, _, cls = path.rpartition(".")
        block = getattr(module(f"timm.layers.{name}"), cls)(*arguments)
        return nn.Sequential(nn.Conv2d(3, 32, 1), block), (images(8),)

    return make


def _unet() -> tuple[nn.Module, tuple[Any, ...]]:
    package = module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    network = package.Unet(dim=8, dim_mults=(1, 2), full_attn=(False, True), flash_attn=False)
    return network, (images(16), torch.tensor([1, 2]))


def _nowcasting() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = module("skillful_nowcasting.layers.Attention").AttentionLayer
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Conv2d(3, 64, 1)), layer(64, 64), norm(nn.Conv2d(64, 3, 1))), (images(8),)


_LABELS = torch.tensor([1, 7])
_M = "torch-mimicry"
CASES = (
    Case("pytorch-pretrained-biggan", "BigGAN", _biggan, {OLDER: 66, ATTENTION: 1}),
    Case(
        _M,
        "SAGANGenerator32",
        _mimicry("sagan.sagan_32.SAGANGenerator32", torch.randn(2, 128), num_classes=10, ngf=32),
        {OLDER: 15, ATTENTION: 1},
    ),
    Case(
        _M,
        "SAGANDiscriminator32",
        _mimicry("sagan.sagan_32.SAGANDiscriminator32", images(), _LABELS, num_classes=10, ndf=32),
        {OLDER: 16, ATTENTION: 1},
    ),
    Case(
        _M,
        "SAGANDiscriminator128",
        _mimicry("sagan.sagan_128.SAGANDiscriminator128", images(), _LABELS, num_classes=10, ndf=128),
        {OLDER: 23, ATTENTION: 1},
    ),
    Case(_M, "SNGANGenerator32", _mimicry("sngan.sngan_32.SNGANGenerator32", torch.randn(2, 128), ngf=16)),
    Case(_M, "SNGANDiscriminator32", _mimicry("sngan.sngan_32.SNGANDiscriminator32", images(), ndf=16), {OLDER: 11}),
    Case(
        _M,
        "CGANPDDiscriminator32",
        _mimicry("cgan_pd.cgan_pd_32.CGANPDDiscriminator32", images(), _LABELS, num_classes=10, ndf=16),
        {OLDER: 10, STORED: 2},
    ),
    Case(
        _M,
        "SSGANDiscriminator32",
        _mimicry("ssgan.ssgan_32.SSGANDiscriminator32", images(), ndf=16),
        {OLDER: 10, STORED: 2},
    ),
    Case(
        _M,
        "InfoMaxGANDiscriminator32",
        _mimicry("infomax_gan.infomax_gan_32.InfoMaxGANDiscriminator32", images(), ndf=16),
        {OLDER: 11},
        6,
    ),
    Case(_M, "DCGANDiscriminator32", _mimicry("dcgan.dcgan_32.DCGANDiscriminator32", images(), ndf=16)),
    Case(_M, "SNConv2d, SNLinear", _mimicry_layers, {STORED: 2}),
    Case("torchgan", "SpectralNorm2d, SelfAttention2d", _torchgan, {WRAPPER: 2}, 1),
    Case("attn-gan-pytorch", "Generator", _attn_gan("Generator"), {WRAPPER: 2, ATTENTION: 1}),
    Case("attn-gan-pytorch", "Discriminator", _attn_gan("Discriminator"), {WRAPPER: 2, ATTENTION: 1}),
    Case("deoldify", "fastai.layers.SelfAttention", _fastai("SelfAttention"), {OLDER: 3, ATTENTION: 1}),
    Case("deoldify", "fastai.layers.PooledSelfAttention2d", _fastai("PooledSelfAttention2d"), {OLDER: 4, ATTENTION: 1}),
    Case("deoldify", "fastai.layers.conv_layer", _fastai_conv_layer, {OLDER: 5, ATTENTION: 1}),
    Case("deoldify", "custom_conv_layer", _deoldify, {OLDER: 5, ATTENTION: 1}),
    Case("taming-transformers", "Encoder", _taming("Encoder"), {ATTENTION: 2}),
    Case("taming-transformers", "Decoder", _taming("Decoder"), {ATTENTION: 3}),
    Case("taming-transformers", "NLayerDiscriminator", _taming("NLayerDiscriminator")),
    Case("diffusers", "Encoder", _diffusers("Encoder"), {ATTENTION: 1}),
    Case("diffusers", "Decoder", _diffusers("Decoder"), {ATTENTION: 1}),
    Case("stylegan2_pytorch", "Generator", _stylegan2("Generator"), {}, 2),
    Case("stylegan2_pytorch", "Discriminator", _stylegan2("Discriminator"), {}, 2),
    Case("unet-stylegan2", "Generator", _unet_stylegan2("Generator"), {}, 3),
    Case("unet-stylegan2", "Discriminator", _unet_stylegan2("Discriminator"), {}, 3),
    Case("lightweight-gan", "Generator", _lightweight("Generator"), {}, 1),
    Case("lightweight-gan", "Discriminator", _lightweight("Discriminator"), {}, 3),
    Case("pro-gan-pth", "Discriminator", _pro_gan),
    Case("skillful-nowcasting", "AttentionLayer", _nowcasting, {PARAMETRIZATION: 2}, 1),
    Case("denoising-diffusion-pytorch", "Unet", _unet, {}, 5),
    Case("timm", "NonLocalAttn", _timm("non_local_attn.NonLocalAttn", 32), {}, 1),
    Case("timm", "BottleneckAttn", _timm("bottleneck_attn.BottleneckAttn", 32, 32, (8, 8)), {}, 1),
    Case("timm", "HaloAttn", _timm("halo_attn.HaloAttn", 32, 32), {}, 1),
)


@dataclass
class Outcome:
    """Return a report and each check's finding: "equal", "as the original" if it fails too, or the trouble."""

    report: FuseReport
    checks: dict[str, str]
    dtype: torch.dtype

    def counts(self) -> Counter[str]:
        return Counter(part.what for part in self.report.swapped)


def run(case: Case, *, compile: bool = True) -> Outcome:
    """Fuse a copy of the case's network and compare the two."""
    torch.manual_seed(0)
    original, inputs = case.make()
    dtype = torch.float64
    try:
        doubled = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)
        _call(copy.deepcopy(original).double(), doubled)
        original, inputs = original.double(), doubled
    except Exception:  # code that makes float32 tensors
        dtype = torch.float32
    fused, report = fuse(original, inputs, copy=True)
    pair = original, fused
    outcomes: dict[str, str] = {}
    for check in CHECKS:
        if check == "compile" and not compile:
            continue
        results = []
        for model in pair:
            state = copy.deepcopy(model.state_dict())
            model.train()
            try:
                results.append(_CHECKS[check](model, pair, inputs))
            except Exception as error:  # whatever code that was never seen may raise
                results.append(error)
            model.load_state_dict(state)
        outcomes[check] = _compared(*results, TOLERANCE[dtype])
    return Outcome(report, outcomes, dtype)


def _compared(theirs: Any, ours: Any, tolerance: float) -> str:
    if isinstance(ours, Exception):
        return "as the original" if isinstance(theirs, Exception) else f"{type(ours).__name__}: {ours}"
    if isinstance(theirs, Exception):
        return "only fused"
    if len(theirs) != len(ours):
        return "other results"
    norms = [float(t.double().norm()) for t in theirs]
    for a, b, norm in zip(ours, theirs, norms, strict=True):
        difference = float((a.double() - b.double()).norm()) / max(norm + 1e-2 * max(norms), 1e-30)
        if a.shape != b.shape or not difference <= tolerance:
            return f"differs by {difference:.0e}"
    return "equal"


def _call(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(1)  # some draw labels or noise
    return [t for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor)]


def _forward(model: nn.Module, _pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    return [t.detach() for t in _call(model, inputs)]


def _loss(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    return torch.stack([t.square().mean() for t in _call(model, inputs) if t.requires_grad]).sum()


def _gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros(1) if g is None or not g.any() else g for g in found]


def _gradient(model: nn.Module, _pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    return _gradients(_loss(model, inputs), model)


def _penalty(model: nn.Module, _pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    inputs = tree_map(lambda t: t.clone().requires_grad_() if _is_floating(t) else t, inputs)
    floating = [t for t in inputs if _is_floating(t)]
    found = torch.autograd.grad(_loss(model, inputs), floating, create_graph=True, allow_unused=True)
    return _gradients(torch.stack([(g.norm() - 1).square() for g in found if g is not None]).sum(), model)


def _is_floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _steps(model: nn.Module, _pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = _loss(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(t.clone() for t in model.state_dict().values() if t.is_floating_point())]


def _eval(model: nn.Module, _pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    _call(model, inputs)  # eval mode divides by what vectors that were never updated give
    with torch.no_grad():
        return _call(model.eval(), inputs)


def _state_dict(model: nn.Module, pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Load the other's state after a training forward, and run it in eval mode."""
    other = copy.deepcopy(pair[0] if model is pair[1] else pair[1]).train()
    _call(other, inputs)
    assert list(model.state_dict()) == list(other.state_dict())
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        return _call(model.eval(), inputs)


def _deepcopy(model: nn.Module, _pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    return _steps(copy.deepcopy(model), None, inputs)


def _unfused(model: nn.Module, pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    model = unfuse(copy.deepcopy(model))
    theirs = [type(m).__name__ for m in pair[0].modules()]
    assert [type(m).__name__ for m in model.modules()] == theirs
    return _steps(model, None, inputs)


def _compiled(model: nn.Module, _pair: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(model), backend="aot_eager")
    return _forward(compiled, None, inputs)


_CHECKS: dict[str, Callable[[nn.Module, Any, tuple[Any, ...]], list[Tensor]]] = dict(
    zip(
        CHECKS,
        (_forward, _gradient, _penalty, _steps, _eval, _state_dict, _deepcopy, _unfused, _compiled),
        strict=True,
    )
)

_HEAD = """# Models that fuse was run on

Made by `python -m tests.nn.fusion.public_models`. Each network is fused as its package makes it, then compared with
the original: outputs, first gradients, the gradients of a gradient penalty, three optimizer steps, eval mode, state
dicts loaded both ways, three steps of a deep copy and after `unfuse`, and a forward under `torch.compile`. "equal"
means up to {tolerances} of the norm. "as the original" means that the original fails
too, "only fused" that only the fused model works.
"""


def write_table() -> None:
    """Print the table of all cases whose packages are installed, in Markdown."""
    tolerances = " and ".join(f"{value:g} in {str(dtype)[6:]}" for dtype, value in TOLERANCE.items())
    print(_HEAD.format(tolerances=tolerances))
    print("| package | network | swapped | left as it was | " + " | ".join(CHECKS) + " |")
    print("|---" * (4 + len(CHECKS)) + "|")
    for case in CASES:
        if not case.installed:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                outcome = run(case)
            cells = _row(outcome)
        except Exception as error:  # a package that does not run under this torch
            cells = [f"does not run here: {type(error).__name__}: {error}"]
        cells = [f"{case.package} {metadata.version(case.package)}", case.name, *cells]
        print("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |", flush=True)


def _row(outcome: Outcome) -> list[str]:
    counts = outcome.counts()
    attention = counts.pop(ATTENTION, 0)
    kinds = ((sum(counts.values()), "norm"), (attention, "attention block"))
    swapped = ", ".join(f"{n} {what}{'s' if n > 1 else ''}" for n, what in kinds if n)
    left = Counter(part.reason for part in outcome.report.refused)
    reasons = "; ".join(f"{n} part{'s' if n > 1 else ''}: {reason}" for reason, n in left.items())
    return [swapped or "nothing", reasons or "-", *outcome.checks.values()]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write_table()
