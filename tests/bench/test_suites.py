"""Suites without a package that a peer needs, and with some of their implementations only."""

import sys

import pytest
from rich.console import Console

from bench import session
from bench.bench_sqrtm import QUICK_SIZE, rank_deficient
from fastgan.bench.harness import Workload, check_all
from fastgan.bench.records import read_run

pytest.importorskip("scipy.linalg")


def test_scipy_is_one_row_among_others(monkeypatch):
    import scipy.linalg

    workload = rank_deficient(QUICK_SIZE, "cpu")
    plain = scipy.linalg.sqrtm
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda A: plain(A))
    records = check_all("sqrtm", workload, "cpu")
    assert {name for name, record in records.items() if record.failure} == set()
    errors = {name: record.error for name, record in records.items() if name.startswith("fastgan")}
    assert max(errors.values()) < 1e-9

    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    records = check_all("sqrtm", workload, "cpu")
    assert {name for name, record in records.items() if record.failure} == {"scipy.linalg.sqrtm"}


def absent():
    import no_such_package  # noqa: F401


def broken():
    raise RuntimeError("no such device")


def workloads(quick, device):
    def check(result, expected):
        return abs(result - expected)

    yield Workload(
        "sums", {"eager": lambda: 1, "fastgan a": lambda: 1, "fastgan b": lambda: 1, "peer": lambda: 1}, "eager", check
    )
    yield Workload("photographs", {"fastgan fp32": absent, "fastgan bf16": absent}, "fastgan fp32", check)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"eager", "fastgan a", "fastgan b", "peer"}),
        ({"only": ["fastgan"]}, {"eager", "fastgan a", "fastgan b"}),
        ({"only": [" a", "peer"], "without": ["pee"]}, {"eager", "fastgan a"}),
        ({"without": ["eager", "fastgan b"]}, {"eager", "fastgan a", "peer"}),
    ],
)
def test_some_implementations_beside_the_reference(options, names, monkeypatch, tmp_path):
    monkeypatch.setattr(session, "load", lambda suite, quick, device: list(workloads(quick, device))[:1])
    done = session.Session(folder=tmp_path, quick=True, device="cpu", seconds=0.01, **options).run_suite("sums")
    assert done == []
    assert {record.implementation for record in read_run(tmp_path / "sums-quick.json").records} == names


def test_a_missing_package_is_no_failure_and_another_error_is(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "load", workloads_of)
    made = session.Session(folder=tmp_path, quick=True, device="cpu", seconds=0.01)
    assert made.run_suite("fid") == ["fid / broken / fastgan: no such device"]


def workloads_of(suite, quick, device):
    yield from workloads(quick, device)
    yield Workload("broken", {"eager": lambda: 1, "fastgan": broken}, "eager", lambda result, expected: 0.0)


@pytest.mark.parametrize(("width", "shows"), [(200, True), (60, False)])
def test_a_narrow_table_drops_columns_and_breaks_no_cell(width, shows, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "load", workloads_of)
    console = Console(width=width)
    session.Session(folder=tmp_path, quick=True, device="cpu", seconds=0.01, console=console).run_suite("sums")
    printed = capsys.readouterr().out
    assert "fastgan a" in printed
    assert "median" in printed
    assert "…" not in printed
    assert ("20 %" in printed) == shows
