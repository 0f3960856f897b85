"""The suites under pytest-benchmark: ``pytest bench --benchmark-only``."""

from functools import cache, partial

import pytest
import torch

from bench.session import SUITES, load
from fastgan.bench import check_all
from fastgan.bench.harness import flush_cache, wait

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _cases():
    for suite in SUITES:
        for workload in load(suite, True, DEVICE):
            checked = cache(partial(check_all, suite, workload, DEVICE))
            for name in workload.implementations:
                yield pytest.param(workload, name, checked, id=f"{suite}-{workload.name}-{name}")


@pytest.mark.parametrize(("workload", "name", "checked"), list(_cases()))
def test_bench(benchmark, workload, name, checked):
    benchmark.group = workload.name
    failure = checked()[name].failure
    if failure and failure.startswith("wrong"):
        pytest.fail(failure)
    if failure:
        pytest.skip(f"{name} cannot do this work here: {failure}")

    def run():
        workload.implementations[name]()
        wait(DEVICE)

    rounds = 1 if workload.once else workload.min_rounds
    setup = flush_cache if workload.cold and DEVICE == "cuda" else None
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=0 if workload.once else workload.warmup)
