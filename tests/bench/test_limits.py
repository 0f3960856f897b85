"""Floors of workloads, from what the device can do per second."""

import math
import re

import pytest
import torch

from bench import bench_attention, limits, session
from bench.digest import lines
from fastgan.bench.harness import Workload
from fastgan.bench.records import Record, Run, environment, read_run


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(limits, "operations", lambda device, dtype: 1000.0)
    monkeypatch.setattr(limits, "copied_bytes", lambda device, size=0: 10.0)


@pytest.mark.parametrize(
    ("products", "maps", "moved", "seconds"),
    [
        (5000, 0, 0, 5),
        (0, 125, 0, 125 * limits.EXPONENTIAL / 1000),
        (3000, 125, 0, 5),
        (3000, 125, 40, 5),
        (9, 9, 80, 8),
    ],
)
def test_a_cpu_multiplies_and_exponentiates_in_turn_and_moves_meanwhile(products, maps, moved, seconds, rates):
    assert limits.seconds("cpu", torch.float32, products, maps, moved) == pytest.approx(seconds)


def test_a_gpu_does_all_at_once():
    at_once = limits.seconds("cuda", torch.bfloat16, 8e14, 8e12, int(3e12))
    assert at_once == pytest.approx(2)


def test_a_cpu_is_measured_once():
    first = limits.operations("cpu", torch.float32), limits.copied_bytes("cpu", 1 << 16)
    assert all(0 < rate < math.inf for rate in first)
    assert first == (limits.operations("cpu", torch.float32), limits.copied_bytes("cpu", 1 << 16))


def test_floors_grow_with_the_work(rates):
    found = {w.name: w.floor for w in bench_attention.workloads(quick=True, device="cpu")}
    assert all(found.values())
    for forward in [name for name in found if " forward" in name]:
        assert found[forward] < found[forward.replace("forward", "backward")]
        assert found[forward.replace("forward", "backward")] < found[forward.replace("forward", "penalty")]


def test_the_file_names_the_limits(monkeypatch, tmp_path):
    toy = Workload("ones", {"eager": lambda: 1, "fastgan": lambda: 1}, "eager", lambda result, expected: 0.0)
    monkeypatch.setattr(session, "load", lambda suite, quick, device: [toy])
    session.Session(folder=tmp_path, quick=True, device="cpu", seconds=0.01).run_suite("sums")
    found = read_run(tmp_path / "sums-quick.json").environment["limits"]
    assert re.fullmatch(r"float32 \d+ GFLOP/s, float64 \d+ GFLOP/s, copies [\d.]+ GB/s", found)


def test_only_the_full_tables_show_implementations_by_name():
    names = ("eager", "fastgan", "fastgan extension", "fastgan reference")
    times = {
        name: {"median": t, "low": t, "high": t, "rounds": 3}
        for name, t in zip(names, (4.0, 2.0, 1.0, 3.0), strict=True)
    }
    records = tuple(Record("attention", "block", name, {}, **times[name]) for name in names)
    (line,) = lines("attention", Run(environment("cpu"), False, records))
    assert line.own.implementation == line.fastest.implementation == "fastgan"
    assert [r.implementation for r in line.baselines] == ["eager"]
