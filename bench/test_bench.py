"""The suites under pytest-benchmark: ``pytest bench --benchmark-only``."""

import pytest
import torch

from bench.harness import SUITES, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _cases():
    for suite in SUITES:
        for workload in load(suite, True, DEVICE):
            for name in workload.implementations:
                yield pytest.param(workload, name, id=f"{suite}-{workload.name}-{name}")


@pytest.mark.parametrize(("workload", "name"), _cases())
def test_bench(benchmark, workload, name):
    benchmark.group = workload.name
    try:
        result = workload.implementations[name]()
    except (RuntimeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"{name} cannot do this work here: {error}")
    if name != workload.reference:
        expected = workload.implementations[workload.reference]()
        assert workload.check(result, expected) <= workload.tolerance
    benchmark(workload.implementations[name])
