"""The record of the costs of large sets, and the tables made from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report import _duration, _scale, _time
from fastgan.bench.records import read_run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the simulation forks")
def test_the_record_and_its_tables(tmp_path):
    command = [sys.executable, "-m", "bench.scale", "--quick", "--results", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=500)
    run = read_run(tmp_path / "cpu" / "scale-quick.json")
    records = {record.workload: record for record in run.records}
    assert list(records) == [
        "decode",
        "resize",
        "network",
        "moments",
        "merge",
        "root",
        "reduce-1",
        "reduce-2",
        "reduce-4",
    ]
    assert records["moments"].parameters["bytes"] == 8 * 64 * 64
    # the sum of outer products and the mean, whatever the number of processes
    assert {records[f"reduce-{n}"].parameters["bytes"] for n in (1, 2, 4)} == {8 * 64 * 64 + 8 * 64}
    assert all(records[f"reduce-{n}"].error < 1e-12 for n in (1, 2, 4))
    passes = [records[f"reduce-{n}"].parameters["pass_seconds"] for n in (1, 2, 4)]
    assert all(seconds >= 256 / n * 1e-4 for seconds, n in zip(passes, (1, 2, 4), strict=True))

    text = _scale({tmp_path: {"scale": run}})
    decode = records["decode"]
    assert f"| decode | {_time(decode.median / 4)} | {_duration(decode.median / 4 * 50_000)} |" in text
    assert text.count("\n| ") == 2 * 2 + 6 + 3  # headers, separators, rows
    assert _scale({}) == "**Not measured yet.**"


def test_durations():
    assert [_duration(s) for s in (0.02, 59, 90, 7200, 86400, 1e9)] == [
        "20 ms",
        "59 s",
        "1.5 min",
        "2 hours",
        "1 days",
        "31.7 years",
    ]
