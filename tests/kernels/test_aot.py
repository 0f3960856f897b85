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
    assert "accesses to local memory in a loop" in result.stdout, result.stderr
    assert "bytes of local memory" in result.stdout, result.stderr


def test_accesses_to_local_memory_are_counted_in_loops_alone():
    code = """
from fastgan.kernels.aot import accesses_in_loops
print(accesses_in_loops('''
        /*0010*/                   STL [R1], R2 ;                      /* 0x0000000201007387 */
        /*0020*/                   LDL R2, [R1] ;                      /* 0x0000000001027983 */
        /*0030*/                   FFMA R2, R2, R3, R4 ;               /* 0x0000000302027223 */
        /*0040*/              @P0  BRA 0x20 ;                          /* 0xfffffffc00f00947 */
        /*0050*/                   STL.64 [R1+0x8], R2 ;               /* 0x0000080201007387 */
        /*0060*/                   BRA 0x80 ;                          /* 0x0000000000087947 */
        /*0070*/                   LDL R5, [R1+0x8] ;                  /* 0x0000080001057983 */
        /*0080*/                   BRA 0x80 ;                          /* 0xfffffffc00fc7947 */
'''))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "1\n", result.stderr


def test_interpreting_is_refused():
    command = [sys.executable, "-m", "fastgan.kernels.report"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
