"""``bench/gpu.sh`` with an interpreter that only pretends."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


def gpu_script(tmp_path, interpreter: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script, whose repository is ``tmp_path``."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "fastgan").mkdir()
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{interpreter}\n")
    python.chmod(0o755)
    return subprocess.run(
        ["bash", shutil.copy(SCRIPT, tmp_path / "bench")],
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
    limits = [int(limit) for limit in re.findall(r"^  \w+ +(\d+) s  ", done.stdout, flags=re.MULTILINE)]
    assert len(limits) == 12
    assert 1490 <= sum(limits) <= 1500  # 25 minutes
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("part", ["1", "2", "3"])
def test_each_part_builds_and_takes_nine_minutes(tmp_path, part):
    done = gpu_script(tmp_path, "exit 1", PART=part)
    assert done.returncode == 3
    limits = dict(re.findall(r"^  (\w+) +(\d+) s  ", done.stdout, flags=re.MULTILINE))
    assert "build" in limits
    assert "report" in limits
    assert 530 <= sum(map(int, limits.values())) <= 540


def test_the_parts_have_all_steps(tmp_path):
    found = set()
    for part in ("1", "2", "3"):
        (tmp_path / part).mkdir()
        found |= set(
            re.findall(r"^  (\w+) +\d+ s  ", gpu_script(tmp_path / part, "exit 1", PART=part).stdout, re.MULTILINE)
        )
    (tmp_path / "all").mkdir()
    every = re.findall(r"^  (\w+) +\d+ s  ", gpu_script(tmp_path / "all", "exit 1").stdout, re.MULTILINE)
    assert found == set(every)
    (tmp_path / "four").mkdir()
    refused = gpu_script(tmp_path / "four", "exit 1", PART="4")
    assert refused.returncode == 2
    assert "PART must be 1, 2 or 3, got '4'" in refused.stderr


def test_a_step_stops_when_its_time_is_over(tmp_path):
    done = gpu_script(tmp_path, 'case "$*" in *pytest*) exec sleep 60;; esac', STEPS="test report", MINUTES="0")
    assert done.returncode == 1
    first, second = (tmp_path / "logs" / "summary.txt").read_text().splitlines()
    assert first.split()[:4] == ["test", "STOPPED", "after", "1"]
    assert second.split()[0] == "report"
    assert (tmp_path / "logs" / "report.log").exists()


def test_a_step_without_its_program_is_left_out(tmp_path):
    """A sanitizer that is not there is no failure; the summary names it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "sh", "dirname", "mkdir", "ln", "timeout", "tee"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = gpu_script(tmp_path, "exit 0", STEPS="build memcheck", PATH=str(tools))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "logs" / "summary.txt").read_text()
    assert "left out: no compute-sanitizer" in summary
    assert (tmp_path / "fastgan" / "kernels").is_symlink()


def test_a_failing_step_does_not_stop_the_next_and_fails_the_whole(tmp_path):
    done = gpu_script(tmp_path, 'echo "asked: $*"; test "$2" != pytest', STEPS="build test sqrtm")
    assert done.returncode == 1
    summary = (tmp_path / "logs" / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in summary] == [["build", "passed"], ["test", "FAILED,"], ["sqrtm", "passed"]]
    assert "asked: -m bench --device cuda --suite sqrtm --limit " in (tmp_path / "logs" / "sqrtm.log").read_text()


def test_all_steps_passed(tmp_path):
    assert gpu_script(tmp_path, "exit 0", STEPS="build report").returncode == 0


@pytest.mark.parametrize("interpreter", ["exit 0", "exit 1"])
def test_unknown_steps_are_refused(tmp_path, interpreter):
    done = gpu_script(tmp_path, interpreter, STEPS="build bulid")
    assert done.returncode == 2
    assert "no step 'bulid'" in done.stderr
