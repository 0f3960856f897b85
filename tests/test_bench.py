import dataclasses
import json

import pytest
import torch

from bench.__main__ import main
from bench.harness import SUITES, Workload, load, run, save


def workload(**implementations):
    def right():
        return torch.ones(3)

    return Workload(
        name="ones",
        implementations={"right": right, **implementations},
        reference="right",
        check=lambda a, b: (a - b).abs().max().item(),
    )


def test_a_wrong_answer_is_never_timed():
    records = {r.implementation: r for r in run("toy", workload(wrong=lambda: torch.zeros(3)), 0.0)}
    assert records["wrong"].median is None
    assert records["wrong"].failure == "wrong: relative error 1.0e+00"
    assert records["right"].median > 0
    assert records["right"].rounds >= 3


def test_an_implementation_that_cannot_run_says_why():
    def fail():
        raise RuntimeError("needs a GPU\nand more")

    records = {r.implementation: r for r in run("toy", workload(absent=fail), 0.0)}
    assert records["absent"].failure == "needs a GPU"


def test_what_runs_once_is_timed_when_it_is_checked():
    calls = []
    slow = dataclasses.replace(
        workload(wrong=lambda: torch.zeros(3), slow=lambda: calls.append(1) or torch.ones(3)), once=True
    )
    records = {r.implementation: r for r in run("toy", slow, 1.0)}
    assert len(calls) == 1
    assert (records["slow"].rounds, records["slow"].error) == (1, 0.0)
    assert records["slow"].median > 0
    assert records["wrong"].failure.startswith("wrong")


def test_results_on_disk(tmp_path):
    path = tmp_path / "cpu" / "toy.json"
    save(run("toy", workload(), 0.0), path, "cpu", quick=True)
    written = json.loads(path.read_text())
    assert written["schema"] == 1
    assert written["quick"] is True
    assert written["environment"]["torch"] == torch.__version__
    assert written["records"][0]["implementation"] == "right"


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_quick_workloads_with_their_reference(suite):
    names = [w.name for w in load(suite, True, "cpu") if w.reference in w.implementations]
    assert names
    assert len(names) == len(set(names))


def test_unknown_suites_and_devices_are_refused():
    import typer

    with pytest.raises(typer.BadParameter, match="no suite speed; there are attention"):
        main(suite=["speed"])
    if not torch.cuda.is_available():
        with pytest.raises(typer.BadParameter, match="no CUDA device is visible"):
            main(device="cuda")
