import dataclasses
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import sanitize, session
from bench.__main__ import app
from bench.regressions import regressions
from bench.session import SUITES, load
from fastgan.bench import (
    Record,
    RecordError,
    Run,
    Workload,
    environment,
    largest_relative_norm,
    read_run,
    relative_difference,
    relative_norm,
    run,
    write_run,
)
from fastgan.bench.harness import peak_memory


def workload(**implementations):
    def right():
        return torch.ones(3)

    return Workload(
        name="ones",
        implementations={"right": right, **implementations},
        reference="right",
        check=lambda a, b: (a - b).abs().max().item(),
    )


def run_of(*records, **environment_changes):
    return Run(environment("cpu") | environment_changes, True, records)


def record(median=1.0, spread=0.1, **values):
    times = {"median": median, "low": median * (1 - spread), "high": median * (1 + spread), "rounds": 5}
    return Record(
        **{"suite": "toy", "workload": "ones", "implementation": "right", "parameters": {}, **times, **values}
    )


@pytest.mark.parametrize("wrong", [0.0, math.nan, math.inf])
def test_a_wrong_answer_is_never_timed(wrong):
    calls = []
    found = run("toy", workload(wrong=lambda: calls.append(1) or torch.full((3,), wrong)), 0.0, "cpu")
    records = {r.implementation: r for r in found}
    assert len(calls) == 1
    assert records["wrong"].median is None
    assert records["wrong"].failure.startswith("wrong: relative error")
    assert records["right"].median > 0
    assert records["right"].rounds >= 3


def test_nothing_is_timed_without_the_reference():
    def fail():
        raise ValueError("no reference")

    broken = dataclasses.replace(workload(other=lambda: torch.ones(3)), reference="broken")
    broken = dataclasses.replace(broken, implementations={"broken": fail, **broken.implementations})
    records = run("toy", broken, 0.0, "cpu")
    assert [r.failure for r in records] == ["no reference", "the reference failed", "the reference failed"]


def test_the_next_implementation_replaces_a_missing_reference():
    def absent():
        raise ModuleNotFoundError("No module named 'theirs'")

    others = {"wrong": lambda: torch.zeros(3), "absent too": absent}
    theirs = dataclasses.replace(workload(theirs=absent, **others), reference="theirs")
    records = {r.implementation: r for r in run("toy", theirs, 0.0, "cpu")}
    assert list(records) == ["right", "wrong", "absent too", "theirs"]
    assert records["right"].median > 0
    assert records["right"].error is None
    assert records["wrong"].failure.startswith("wrong: relative error")
    assert records["theirs"].failure == records["absent too"].failure == "No module named 'theirs'"


def test_errors():
    one, half = torch.ones(4), torch.tensor([1, 1, 1, 0.5])
    assert relative_norm(half, one) == 0.25
    assert relative_difference(half, one) == relative_difference(1.5, 3.0) == 0.5
    assert largest_relative_norm([one, half, one], [one, one, None]) == 0.25
    assert largest_relative_norm([one, None], [one, torch.zeros(4)]) == 0
    assert largest_relative_norm([one, None], [one, one]) == math.inf
    assert math.isnan(relative_norm(torch.full((4,), math.nan), one))


def test_an_implementation_that_cannot_run_says_why():
    def fail():
        raise AssertionError("needs a GPU\nand more")

    records = {r.implementation: r for r in run("toy", workload(absent=fail), 0.0, "cpu")}
    assert records["absent"].failure == "needs a GPU"


def test_a_failure_while_timing_stops_only_its_workload():
    calls = []

    def exhausted():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return torch.ones(3)

    records = run("toy", workload(exhausted=exhausted, wrong=lambda: torch.zeros(3)), 0.0, "cpu")
    failures = [r.failure for r in records]
    assert failures[:2] == ["not timed: out of memory"] * 2
    assert failures[2].startswith("wrong")


def test_an_implementation_that_runs_once_is_timed_by_the_check():
    calls = []
    slow = dataclasses.replace(
        workload(wrong=lambda: torch.zeros(3), slow=lambda: calls.append(1) or torch.ones(3)), once=True
    )
    records = {r.implementation: r for r in run("toy", slow, 1.0, "cpu")}
    assert len(calls) == 1
    assert (records["slow"].rounds, records["slow"].error) == (1, 0.0)
    assert records["slow"].median > 0
    assert records["wrong"].failure.startswith("wrong")


def test_a_slow_implementation_runs_once_beside_others():
    calls = []
    both = workload(slow=lambda: calls.append(1) or time.sleep(0.3) or torch.ones(3))
    records = {r.implementation: r for r in run("toy", dataclasses.replace(both, once_above=0.25), 0.0, "cpu")}
    assert len(calls) == records["slow"].rounds == 1
    assert 0.3 <= records["slow"].median < 1
    assert records["right"].rounds >= 3


def test_calls_are_interleaved_after_a_warm_up():
    calls = []
    both = workload(a=lambda: calls.append("a") or torch.ones(3), b=lambda: calls.append("b") or torch.ones(3))
    run("toy", dataclasses.replace(both, warmup=2, min_rounds=40), 0.0, "cpu")
    checked, warm, rounds, measured = calls[:2], calls[2:6], calls[6:-2], calls[-2:]
    assert checked == measured == ["a", "b"]
    assert warm == ["a", "a", "b", "b"]
    assert len(rounds) >= 80
    orders = list(zip(rounds[::2], rounds[1::2], strict=True))
    assert set(orders) == {("a", "b"), ("b", "a")}  # neither always follows the other
    assert 10 < orders.count(("a", "b")) < len(orders) - 10


def test_peak_memory_on_a_cpu():
    x = torch.randn(500, 64)
    whole = 4 * 500 * 500
    assert 2 * whole <= peak_memory(lambda: (x @ x.T).softmax(-1) @ x, "cpu") < 2.2 * whole
    assert peak_memory(lambda: None, "cpu") is None


def test_results_on_disk(tmp_path):
    path = tmp_path / "cpu" / "toy.json"
    written = Run(environment("cpu"), True, tuple(run("toy", workload(), 0.0, "cpu")))
    write_run(written, path)
    assert read_run(path) == written
    assert written.environment["torch"] == torch.__version__
    assert written.records[0].first_call > 0


def test_at_its_limit_a_session_writes_its_records_and_starts_nothing(tmp_path, monkeypatch, capsys):
    def workloads(suite, quick, device):
        yield workload()
        yield dataclasses.replace(workload(right=lambda: time.sleep(0.2) or torch.ones(3)), name="slow")
        yield dataclasses.replace(workload(), name="late")
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "load", workloads)
    limited = session.Session(tmp_path, quick=True, device="cpu", seconds=0.0, limit=0.2)
    with pytest.raises(KeyboardInterrupt):
        limited.run_suite("toy")
    written = read_run(tmp_path / "toy-quick.json")
    assert list(written.workloads()) == ["ones", "slow"]
    assert "toy: left out after 0 s: late" in capsys.readouterr().out


def test_every_key_of_a_record_is_described():
    table = (Path(session.__file__).parent / "README.md").read_text().partition("| key of a record | |")[2]
    described = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])}
    assert described == {field.name for field in dataclasses.fields(Record)}


BAD = {
    "not a record": ({"records": ["x"]}, r"records\[0\] must be an object"),
    "no record": ({"records": []}, "at least one record"),
    "another schema": ({"schema": 0}, "schema must be 1, got 0"),
    "no device": ({"environment": {"python": "3"}}, "environment lacks device, torch, revision"),
    "quick": ({"quick": "yes"}, "quick must be true or false"),
}
BAD_RECORDS = {
    "unknown key": ({"speed": 1}, "unknown key speed"),
    "type": ({"rounds": 1.5}, "rounds must be an integer, got 1.5"),
    "neither times nor failure": ({"median": None, "low": None, "high": None}, "either times or a failure"),
    "times and failure": ({"failure": "x"}, "either times or a failure"),
    "quantiles": ({"low": 2.0}, "low <= median <= high"),
    "not finite": ({"error": math.inf}, "error must be a finite number or null"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_RECORDS])
def test_the_schema_is_checked(tmp_path, name):
    path = tmp_path / "toy.json"
    write_run(run_of(record()), path)
    content = json.loads(path.read_text())
    changes, message = BAD.get(name) or BAD_RECORDS[name]
    (content if name in BAD else content["records"][0]).update(changes)
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=message):
        read_run(path)


def test_records_against_the_schema_are_not_written(tmp_path):
    with pytest.raises(RecordError, match="rounds must be at least 1"):
        write_run(run_of(record(rounds=0)), tmp_path / "toy.json")
    with pytest.raises(RecordError, match="more than one record of toy / ones / right"):
        write_run(run_of(record(), record()), tmp_path / "toy.json")
    assert not list(tmp_path.iterdir())


FAILED = dataclasses.replace(record(), median=None, low=None, high=None, rounds=0, failure="wrong")


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (record(1.0), record(1.15), []),  # quantiles overlap
        (record(1.0, 0.0), record(1.04, 0.0), []),  # too little
        (record(1.0), record(1.3), ["1000 ms -> 1300 ms, 1.30 times as long"]),
        (record(1.0, rounds=1, spread=0), record(1.15, rounds=1, spread=0), []),
        (record(1.0, rounds=1, spread=0), record(1.25, rounds=1, spread=0), ["1000 ms -> 1250 ms"]),
        (record(1.3), record(1.0), []),
        (record(peak_memory=1_000_000), record(peak_memory=2_000_000), ["1.0 MB -> 2.0 MB"]),
        (record(launches=3), record(launches=4), ["3 launches -> 4"]),
        (record(), FAILED, ["failed: wrong"]),
        (FAILED, record(), []),
    ],
    ids=lambda value: None,
)
def test_regressions_are_what_exceeds_the_noise(old, new, found):
    worse = regressions(run_of(old), run_of(new))
    assert len(worse) == len(found)
    for line, part in zip(worse, found, strict=True):
        assert line.startswith(f"toy / ones / right: {part}")


def test_compare_on_the_command_line(tmp_path):
    for name, median in (("old", 1.0), ("new", 2.0)):
        write_run(run_of(record(median)), tmp_path / f"{name}.json")
    write_run(run_of(record(), device="another"), tmp_path / "other.json")

    def compare(*names):
        return CliRunner().invoke(app, ["--compare", *(str(tmp_path / f"{name}.json") for name in names)])

    assert compare("old", "old").exit_code == 0
    worse = compare("old", "new")
    assert worse.exit_code == 1
    assert "2.00 times as long" in worse.output
    for impossible in ("other", "absent"):
        assert compare("old", impossible).exit_code == 2


@pytest.mark.slow
@pytest.mark.usefixtures("device")
def test_the_sanitizers_program_equals_the_reference(capsys):
    sanitize.main(["attention", "spectral_norm"])
    assert capsys.readouterr().out.splitlines() == ["attention: as the reference", "spectral_norm: as the reference"]


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_quick_workloads_with_their_reference(suite):
    names = [w.name for w in load(suite, True, "cpu") if w.reference in w.implementations]
    assert names
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "no suite speed; there are attention"),
        (["--quick", "--suite", "attention", "--output", __file__], "is a file"),
        (["--quick", "--seconds", "-1"], "'--seconds'"),
        (["--device", "tpu"], "must be cpu or cuda, got tpu"),
        (["--quick", "--suite", "attention", "--baseline", "nobody"], "no workload has 'nobody'"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU"),
        ),
    ],
)
def test_bad_options_are_refused(arguments, message):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert message in result.output


def test_list_runs_nothing():
    result = CliRunner().invoke(app, ["--list", "--quick", "--suite", "attention"])
    assert result.exit_code == 0
    assert "eager" in result.output
