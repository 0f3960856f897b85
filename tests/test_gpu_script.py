"""``bench/gpu.sh`` with an interpreter that only pretends."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"


def gpu_script(tmp_path, interpreter: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{interpreter}\n")
    python.chmod(0o755)
    return subprocess.run(
        ["bash", SCRIPT],
        env={**os.environ, "PYTHON": str(python), "LOGS": str(tmp_path / "logs"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_a_gpu_it_says_what_it_would_do(tmp_path):
    done = gpu_script(tmp_path, "exit 1")
    assert done.returncode == 3
    for command in ("pytest -q -m gpu", "compute-sanitizer --tool memcheck", "bench --device cuda --suite sqrtm"):
        assert command in done.stdout
    assert not (tmp_path / "logs").exists()


def test_a_failing_step_does_not_stop_the_next_and_fails_the_whole(tmp_path):
    done = gpu_script(tmp_path, 'echo "asked: $*"; test "$2" != pytest', STEPS="build test sqrtm")
    assert done.returncode == 1
    summary = (tmp_path / "logs" / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in summary] == [["build", "passed"], ["test", "FAILED,"], ["sqrtm", "passed"]]
    assert "asked: -m bench --device cuda --suite sqrtm" in (tmp_path / "logs" / "sqrtm.log").read_text()


def test_all_steps_passed(tmp_path):
    assert gpu_script(tmp_path, "exit 0", STEPS="build report").returncode == 0


@pytest.mark.parametrize("interpreter", ["exit 0", "exit 1"])
def test_unknown_steps_are_refused(tmp_path, interpreter):
    done = gpu_script(tmp_path, interpreter, STEPS="build bulid")
    assert done.returncode == 2
    assert "no step 'bulid'" in done.stderr
