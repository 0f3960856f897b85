"""Every kernel configuration compiles for GPUs that are not here, without local memory in a loop, with at most a few
bytes of it elsewhere, and within the chip's shared memory.

The fast part takes sm_90; the other architectures are slow tests.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from fastgan.kernels.aot import AotCase, Report
from fastgan.kernels.machine_code import MOST_LOCAL
from fastgan.kernels.spectral_norm.plan import TILES


def report(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "fastgan.kernels.report", "--json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "capability", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_every_configuration(capability):
    rows = report("--capability", str(capability))
    assert {row["op"] for row in rows} == {"attention", "projection", "spectral_norm"}
    assert [v for row in rows for v in row["violations"]] == []
    # The spectral norm multiplies matrices by vectors, "ieee" asks for plain float32 instructions.
    assert all(row["mma"] for row in rows if row["op"] != "spectral_norm" and "ieee" not in row["label"])


@pytest.mark.parametrize(
    "choice",
    [
        ["--channels", "96", "--heights", "33", "--layouts", "channels-first"],
        pytest.param(
            ["--channels", "64", "160", "320", "--heights", "33", "--blocks", "canonical"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--channels", "128", "192", "256", "384", "--heights", "32", "--blocks", "canonical"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one", "odd images", "even images"],
)
def test_the_launches_of_attention_blocks(choice):
    """The table holds for operands that can be loaded 16 bytes at once: the launchers see to it."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.block_launches", *choice]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len({row["kernel"] for row in rows}) == 7
    assert [v for row in rows for v in row["violations"]] == []


def test_a_configuration_that_spills_in_a_loop_is_found():
    code = """
import torch
from fastgan.kernels.aot import attention_case, compile_case
from fastgan.kernels.attention.config import Tile
wasteful = attention_case("bwd_bwd_keys", 64, 256, Tile(64, 64, 256, 4), torch.float16, {"QK": True, "V": True})
print(compile_case(wasteful, 90).violations(wasteful))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment
    )
    assert "accesses to local memory in a loop" in result.stdout, result.stderr
    assert "bytes of local memory" in result.stdout, result.stderr


def test_a_little_local_memory_outside_loops_is_allowed():
    usage = {"registers": 255, "shared": 0, "mma": (), "num_warps": 4, "occupancy": 0.1}
    case = AotCase(None, {}, {}, TILES, "float32")
    for local, in_loops, allowed in ((0, 0, True), (16, 0, True), (16, 1, False), (MOST_LOCAL + 8, 0, False)):
        report = Report("some_kernel", "float32", 90, local=local, local_in_loops=in_loops, **usage)
        assert (not report.violations(case)) == allowed


def test_interpreting_is_refused():
    command = [sys.executable, "-m", "fastgan.kernels.report"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
