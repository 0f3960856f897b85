"""The suite of square roots where SciPy is missing, or is one whose sqrtm takes no ``disp``."""

import sys

import pytest

from bench.bench_sqrtm import QUICK_SIZE, rank_deficient
from fastgan.bench.harness import check_all

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
