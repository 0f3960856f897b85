"""Five packages and fastgan on the same folders with the same random weights: ``python -m tests.metrics.peers``.

In a process of the five, pytorch-fid's and torch-fidelity's command run, and a few lines for clean-fid, torchmetrics
and prdc, which have none. Prints both numbers and their relative difference, ends with status 1 if one is above 1e-6,
and leaves out what is not installed.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

import fastgan.metrics
from fastgan.cli import app
from fastgan.metrics.backbones.inception import FILE_NAME
from fastgan.metrics.backbones.inception_network import InceptionV3
from tests.metrics.random_weights import randomize

README = Path(fastgan.metrics.__file__).with_name("README.md")
TOLERANCE = 1e-6
DIMS = 64  # fewer than images, so that no covariance is singular and SciPy's root is exact
N = 80

# SciPy no longer takes the argument with which pytorch-fid and clean-fid call it
SQRTM = """
import sys, scipy.linalg
plain = scipy.linalg.sqrtm
scipy.linalg.sqrtm = lambda matrix, disp=True: plain(matrix) if disp else (plain(matrix), 0.0)
"""
PYTORCH_FID = SQRTM + "from pytorch_fid.fid_score import main; main()"
CLEAN_FID = (
    SQRTM
    + """
import torch
from cleanfid import fid
from pytorch_fid.inception import InceptionV3
network = InceptionV3([0], resize_input=False, normalize_input=False).eval()
@torch.no_grad()
def features(images):  # as InceptionV3W of clean-fid, whose weights are a TorchScript file
    return network((images.float() - 128) / 128)[0].mean((2, 3))
fid.build_feature_extractor = lambda *arguments, **options: features
options = {"mode": "clean", "device": torch.device("cpu"), "num_workers": 0, "verbose": False}
print(fid.compute_fid(sys.argv[1], sys.argv[2], **options))
"""
)
TORCH_FIDELITY = "from torch_fidelity.fidelity import main; main()"
TORCHMETRICS = """
import sys, pathlib, numpy, torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance
a, b, dims, weights = sys.argv[1:]
metrics = [FrechetInceptionDistance(int(dims), feature_extractor_weights_path=weights)]
network = NoTrainInceptionV3("inception-v3-compat", [dims], weights)
metrics.append(KernelInceptionDistance(network, 1, len(list(pathlib.Path(a).iterdir()))))
for root, real in ((a, False), (b, True)):
    paths = sorted(pathlib.Path(root).iterdir())
    images = torch.stack([torch.from_numpy(numpy.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    for metric in metrics:
        metric.update(images, real=real)
metrics[0].set_dtype(torch.float64)
for name in ("real_features", "fake_features"):  # their formula, without the rounding of float32 kernels
    setattr(metrics[1], name, [rows.double() for rows in getattr(metrics[1], name)])
print(float(metrics[0].compute()), float(metrics[1].compute()[0]))
"""
PRDC = """
import sys, json, numpy
from pytorch_fid.fid_score import get_activations
from pytorch_fid.inception import InceptionV3
import pathlib
from prdc import compute_prdc
network = InceptionV3([0]).eval()
a, b = ([str(path) for path in sorted(pathlib.Path(root).iterdir())] for root in sys.argv[1:3])
fake, real = (get_activations(paths, network, 20, 64, "cpu", 0) for paths in (a, b))
print(json.dumps({key: float(value) for key, value in compute_prdc(real, fake, nearest_k=5).items()}))
"""

# One process runs the packages' scripts: importing torch takes longer than their work. It reads a list of
# [script, arguments] and writes a list of what each printed.
TOGETHER = """
import contextlib, io, json, sys
printed = []
for script, arguments in json.load(sys.stdin):
    sys.argv = ["script", *arguments]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        exec(script, {})
    printed.append(text.getvalue())
print(json.dumps(printed))
"""


@dataclass(frozen=True)
class Difference:
    """One number of both."""

    package: str
    metric: str
    theirs: float
    ours: float

    @property
    def relative(self) -> float:
        """The difference, relative to theirs."""
        return abs(self.ours - self.theirs) / abs(self.theirs) if self.theirs else abs(self.ours)


def differences(folder: Path, n: int = N) -> list[Difference]:
    """Every number of the packages that are installed, beside fastgan's. Images and weights are made in ``folder``."""
    rng = np.random.default_rng(1)
    a, b = folder / "a", folder / "b"
    for root, darkest in ((a, 0), (b, 90)):  # of a range of brightness, so that the sets overlap in part
        root.mkdir()
        for i in range(n):
            low = rng.integers(darkest, darkest + 120)
            Image.fromarray(rng.integers(low, 256, (24, 24, 3), dtype=np.uint8)).save(root / f"{i:03}.png")
    weights = folder / "hub" / "checkpoints" / FILE_NAME  # where pytorch-fid looks for them, in TORCH_HOME
    weights.parent.mkdir(parents=True)
    torch.save(randomize(InceptionV3()).state_dict(), weights)
    environment = os.environ | {"TORCH_HOME": str(folder), "PYTHONWARNINGS": "ignore"}

    def fastgan(package: str) -> dict[str, float]:
        """The numbers of the command that the table in fastgan/metrics/README.md names for ``package``."""
        words = shlex.split(same_number()[package])
        command = [{"A": a, "B": b}.get(word, word) for word in words[1:]]
        sizes = ("--subsets", 1, "--subset-size", n) if words[1] == "evaluate" else ()
        arguments = [*command, "--weights", weights, "--dims", DIMS, "--json", "--num-workers", 0, *sizes]
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        values = json.loads(done.stdout)["sets"][0]["metrics"]
        return {name.partition(" (")[0]: value["value"] for name, value in values.items()}

    fidelity = ("--fid", "--kid", "--kid-subset-size", n, "--kid-subsets", 1, "--cpu", "--json", "--silent")
    fidelity += ("--feature-layer-fid", DIMS, "--feature-layer-kid", DIMS, "--no-cache")
    fidelity += ("--feature-extractor-weights-path", weights)
    scripts = {
        "pytorch-fid": (PYTORCH_FID, (a, b, "--dims", DIMS, "--device", "cpu", "--num-workers", 0)),
        "clean-fid": (CLEAN_FID, (a, b)),
        "torch-fidelity": (TORCH_FIDELITY, ("--input1", a, "--input2", b, *fidelity)),
        "torchmetrics": (TORCHMETRICS, (a, b, DIMS, weights)),
        "prdc": (PRDC, (a, b)),
    }
    scripts = {name: script for name, script in scripts.items() if _installed(*NEEDED[name])}
    theirs = dict(zip(scripts, _printed([*scripts.values()], environment), strict=True))
    found = []
    if "pytorch-fid" in theirs:
        value = float(theirs["pytorch-fid"].split()[-1])
        found.append(Difference("pytorch-fid", "FID", value, fastgan("pytorch-fid")["FD"]))
    if "clean-fid" in theirs:
        value = float(theirs["clean-fid"].split()[-1])
        found.append(Difference("clean-fid", "FID", value, fastgan("clean-fid")["FD"]))
    if "torch-fidelity" in theirs:
        values, ours = json.loads(theirs["torch-fidelity"]), fastgan("torch-fidelity")
        for key, name in (("frechet_inception_distance", "FD"), ("kernel_inception_distance_mean", "KD")):
            found.append(Difference("torch-fidelity", name.replace("D", "ID"), values[key], ours[name]))
    if "torchmetrics" in theirs:
        values, ours = [float(value) for value in theirs["torchmetrics"].split()], fastgan("torchmetrics")
        found.append(Difference("torchmetrics", "FID", values[0], ours["FD"]))
        found.append(Difference("torchmetrics", "KID", values[1], ours["KD"]))
    if "prdc" in theirs:
        values, ours = json.loads(theirs["prdc"].splitlines()[-1]), fastgan("prdc")
        found += [Difference("prdc", name, value, ours[name]) for name, value in values.items()]
    return found


NEEDED = {
    "pytorch-fid": ("pytorch_fid", "scipy"),
    "clean-fid": ("cleanfid", "pytorch_fid", "scipy"),
    "torch-fidelity": ("torch_fidelity",),
    "torchmetrics": ("torchmetrics", "torch_fidelity"),
    "prdc": ("prdc", "pytorch_fid"),
}
"""The modules that the script of each package imports."""


def _printed(scripts: list[tuple[str, tuple[object, ...]]], environment: dict[str, str]) -> list[str]:
    """Return the output of each script with its arguments."""
    given = json.dumps([(script, [str(one) for one in arguments]) for script, arguments in scripts])
    command = [sys.executable, "-c", TOGETHER]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def same_number() -> dict[str, str]:
    """The table of fastgan/metrics/README.md: fastgan's command by package."""
    rows = re.findall(r"^\| ([\w-]+) \| `.*` \| `(fastgan .*)` \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def main() -> int:
    """Print the table. Returns 1 if a difference is too large."""
    argparse.ArgumentParser(description="fastgan beside five packages").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = differences(Path(folder))
    for one in found:
        print(f"{one.package:16}{one.metric:12}{one.theirs:<24}{one.ours:<24}{one.relative:.1e}")
    return int(any(one.relative > TOLERANCE for one in found))


if __name__ == "__main__":
    sys.exit(main())
