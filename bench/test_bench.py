"""The suites under pytest-benchmark: ``pytest bench --benchmark-only``."""

from dataclasses import replace

import pytest
import torch

from bench.harness import SUITES, check_all, flush_cache, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _cases():
    for suite in SUITES:
        for workload in load(suite, True, DEVICE):
            for name in workload.implementations:
                yield pytest.param(suite, workload, name, id=f"{suite}-{workload.name}-{name}")


@pytest.mark.parametrize(("suite", "workload", "name"), _cases())
def test_bench(benchmark, suite, workload, name):
    benchmark.group = workload.name
    chosen = {n: workload.implementations[n] for n in (workload.reference, name)}
    failure = check_all(suite, replace(workload, implementations=chosen), DEVICE)[name].failure
    if failure and failure.startswith("wrong"):
        pytest.fail(failure)
    if failure:
        pytest.skip(f"{name} cannot do this work here: {failure}")
    run = workload.implementations[name]
    rounds = 1 if workload.once else workload.min_rounds
    setup = flush_cache if workload.cold and DEVICE == "cuda" else None
    benchmark.pedantic(_waiting(run), setup=setup, rounds=rounds, warmup_rounds=0 if workload.once else workload.warmup)


def _waiting(run):
    if DEVICE == "cpu":
        return run

    def run_and_wait():
        run()
        torch.cuda.synchronize()

    return run_and_wait
