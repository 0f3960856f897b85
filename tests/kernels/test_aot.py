"""Kernels compile for GPUs that are not here, without local memory in a loop, with at most a few bytes of it elsewhere,
and within the chip's shared memory.

``make kernels`` compiles every tile for every architecture, which takes minutes. Here are the report that it prints,
the kernels that take moments, and what odd images launch; ``test_cost_model.py`` has what even images and heads launch.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from fastgan.kernels.aot import ARCHITECTURES, OPS, AotCase, Report, cases
from fastgan.kernels.machine_code import MOST_LOCAL
from fastgan.kernels.spectral_norm.plan import TILES


def rows_of(module, *arguments):
    """Return the rows that a compiling module prints. It runs in one process: each imports torch, and tests run in
    parallel."""
    command = [sys.executable, "-W", "ignore", "-m", module, "--processes", "1", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


@pytest.mark.build
def test_the_tiles_of_projections_and_spectral_norm():
    rows = rows_of("fastgan.kernels.report", "--json", "--rows", "--op", "projection", "--op", "spectral_norm")
    assert {(row["op"], row["capability"]) for row in rows} == {
        (op, capability) for op in ("projection", "spectral_norm") for capability in ARCHITECTURES
    }
    assert [v for row in rows for v in row["violations"]] == []
    # The spectral norm multiplies matrices by vectors.
    assert all(row["mma"] for row in rows if row["op"] == "projection")


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_rows_leave_out_no_tile(capability):
    def tiles(found):
        return {(case.kernel.__name__, case.config, case.signature.get("q_ptr")) for case in found}

    for op in OPS:
        every, rows = cases(op, capability), cases(op, capability, rows=True)
        assert tiles(rows) == tiles(every)
        assert len(rows) < len(every)


@pytest.mark.build
def test_the_launches_of_blocks_of_odd_images():
    """The table holds for operands that can be loaded 16 bytes at once: the launchers see to it."""
    choice = ("--channels", "96", "--blocks", "simple", "--layouts", "channels-first", "--heights", "33")
    rows = rows_of("tests.kernels.block_launches", *choice)
    assert len({row["kernel"] for row in rows}) == 5
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
