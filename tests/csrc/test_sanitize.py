"""The C++ iterations without torch, under AddressSanitizer and UBSan: what ``make sanitize-cpu`` runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.build
@pytest.mark.skipif(shutil.which("make") is None or shutil.which("c++") is None, reason="needs make and a C++ compiler")
def test_iterations_are_clean_and_right():
    command = ["make", "--no-print-directory", "sanitize-cpu", "CXX=c++"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if "cannot find" in done.stderr and "asan" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 failures")
    assert done.stdout.count("\n0 failures") == 4  # the iterations, and the kernels for three instruction sets
    assert done.stdout.count("\nok ") > 30


@pytest.mark.build
@pytest.mark.skipif(
    not all(map(shutil.which, ("make", "aarch64-linux-gnu-g++", "qemu-aarch64-static"))),
    reason="needs make, a cross compiler for aarch64 and qemu",
)
def test_kernels_are_right_on_aarch64():
    done = subprocess.run(
        ["make", "--no-print-directory", "aarch64"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 failures")
