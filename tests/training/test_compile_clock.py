"""The prediction of how long a train step takes to compile."""

import json
import re

from fastgan.training import compile_clock
from fastgan.training.compile_clock import CompileClock
from tests.training.small_trainers import trainer


def told(monkeypatch, path, *, steps=2):
    monkeypatch.setattr(compile_clock, "COMPILE_TIMES", path)
    lines = []
    trainer().run(steps, callbacks=[CompileClock(lines.append)])
    return lines


def test_the_second_prediction_is_the_first_time(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "times.json"
    first = told(monkeypatch, path)
    assert first[0] == "compiling the train steps, one to three minutes, once"
    assert re.fullmatch(r"compiled, with the first step, in \d+ s", first[1])
    assert len(first) == 2
    path.write_text(json.dumps({"cpu": 2.0, "cuda": 0.5}))
    layers = compile_clock._layers(trainer())
    second = told(monkeypatch, path)
    assert second[0] == f"compiling the train steps, about {2 * layers} seconds, once"
    kept = json.loads(path.read_text())
    assert kept["cuda"] == 0.5
    assert 0 < kept["cpu"] < 2


def test_layers_are_modules_with_weights():
    networks = trainer()
    names = [
        {name.rpartition(".")[0] for name, _ in n.named_parameters()}
        for n in (networks.generator, networks.discriminator)
    ]
    assert compile_clock._layers(networks) == sum(map(len, names)) > 10


def test_nothing_is_reported_if_no_step_is_left(tmp_path, monkeypatch):
    assert told(monkeypatch, tmp_path / "times.json", steps=0) == []


def test_a_damaged_or_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "times.json").write_text("[1, 2")
    assert told(monkeypatch, tmp_path / "times.json")[0].endswith("one to three minutes, once")
    (tmp_path / "file").write_text("")
    assert len(told(monkeypatch, tmp_path / "file" / "times.json")) == 2
