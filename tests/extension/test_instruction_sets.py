"""Attention on each instruction set of this processor, chosen by ATEN_CPU_CAPABILITY in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from fastgan import backend

pytestmark = pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")

PROGRAM = """
import torch
from tests.extension.checks import assert_three_orders_are_right, assert_three_passes_are_as_accurate
from tests.ops.operands import MASKS, head_operands, masks, operands
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in ((2, 70, 129, 12, 20), (1, 33, 65, 5, 17)):
        assert_three_passes_are_as_accurate(operands(shape, dtype), 0.4)
    for case in MASKS:
        options, full = masks(case, 1, 2, 70, 129)
        assert_three_orders_are_right(head_operands(1, 2, 1, 70, 129, 12, 20, dtype), options, full, 0.3)
print(torch.ops.fastgan_C.vector_bits())
"""


@pytest.mark.parametrize(("capability", "most"), [("default", 128), ("avx2", 256), ("avx512", 512)])
def test_attention_is_accurate_on_every_instruction_set(capability, most):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == min(most, torch.ops.fastgan_C.vector_bits())
