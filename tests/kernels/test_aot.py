"""Every kernel configuration compiles for GPUs that are not here, without local memory and within the chip's shared
memory.

The fast part takes sm_90; the other architectures are slow tests.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


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


def test_a_configuration_that_spills_is_found():
    code = """
import torch
from fastgan.kernels.aot import compile_case
from fastgan.kernels.attention.aot import case
from fastgan.kernels.attention.config import Launch
wasteful = case("bwd_bwd_keys", 64, 256, Launch(64, 64, 256, 4), torch.float16, {"QK": True, "V": True})
print(compile_case(wasteful, 90).violations(wasteful))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment
    )
    assert "bytes of local memory" in result.stdout, result.stderr


def test_interpreting_is_refused():
    command = [sys.executable, "-m", "fastgan.kernels.report"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
