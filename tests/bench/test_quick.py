"""The demonstration's workloads: the implementations agree."""

import pytest

from fastgan.bench import check_all
from fastgan.bench.quick import workloads


def test_timed_implementations_agree():
    pytest.importorskip("scipy")
    for workload in workloads("cpu", sqrtm_dim=16):
        for record in check_all("demo", workload, "cpu").values():
            assert record.failure is None, record
