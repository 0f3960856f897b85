"""The choice of the step mode of a run on a CPU, from given times and from a real step."""

import json

import pytest

from fastgan.data.datasets import load_data
from fastgan.recipes import override
from fastgan.training import fastest_mode as module
from fastgan.training import starting
from fastgan.training.fastest_mode import fastest_mode, measure
from tests.training.tiny_runs import tiny

pytest.importorskip("sklearn")


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A home of its own, and the seconds per step and of compilation that each mode is to take."""
    monkeypatch.setenv("HOME", str(tmp_path))
    times, asked = {"eager": (0.1, 0.1), "compile": (0.08, 60.0)}, []

    def given(recipe, images, mode):
        asked.append(mode)
        return times[mode]

    monkeypatch.setattr(module, "measure", given)
    return times, asked


@pytest.fixture(scope="module")
def images():
    recipe = tiny("dcgan")
    return load_data(recipe.data.source, recipe.model.resolution).train


def recipe_of(steps):
    return override(tiny("dcgan"), [f"steps={steps}"])


def test_a_long_run_is_captured_if_that_is_faster_and_the_times_are_kept(timed, images):
    _, asked = timed
    said = []
    assert fastest_mode(recipe_of(100_000), images, tell=said.append) == "compile"
    assert asked == ["eager", "compile"]
    assert said[-1] == "step_mode auto: compile; a step took 0.08 s captured and 0.1 s eagerly"
    assert fastest_mode(recipe_of(50_000), images, tell=said.append) == "compile"
    assert asked == ["eager", "compile"], "the times are known"
    fastest_mode(override(recipe_of(100_000), ["batch_size=8"]), images, tell=said.append)
    assert len(asked) == 4, "of other updates they are not"


@pytest.mark.parametrize(("captured", "steps"), [((0.11, 60.0), 100_000), ((0.0999, 60.0), 20_000)])
def test_a_run_that_would_lose_by_it_stays_eager(captured, steps, timed, images):
    times, asked = timed
    times["compile"] = captured
    assert fastest_mode(recipe_of(steps), images, tell=lambda _: None) == "eager"
    assert asked == ["eager", "compile"]


def test_a_short_run_compiles_nothing(timed, images):
    _, asked = timed
    said = []
    assert fastest_mode(recipe_of(10_000), images, tell=said.append) == "eager"
    assert asked == ["eager"]
    assert fastest_mode(recipe_of(100), images, tell=said.append) == "eager"
    assert asked == ["eager"]
    assert not said


def test_a_broken_file_of_times_is_measured_anew(timed, images, tmp_path):
    file = tmp_path / ".cache" / "fastgan" / "step_modes.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert fastest_mode(recipe_of(100_000), images, tell=lambda _: None) == "compile"
    assert len(json.loads(file.read_text())) == 1


def test_a_step_is_timed_on_networks_of_its_own(images):
    seconds, before = measure(tiny("dcgan"), images, "eager")
    assert 0 < seconds <= before * 10


def test_the_choice_is_written_with_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(starting, "fastest_mode", lambda *_args, **_options: "compile")
    starting.start_run(tiny("dcgan"), tmp_path / "captured", tell=lambda _: None)
    assert starting.run_recipe(tmp_path / "captured").train.step_mode == "compile"
    starting.start_run(override(tiny("dcgan"), ["step_mode=eager"]), tmp_path / "eager", tell=lambda _: None)
    assert starting.run_recipe(tmp_path / "eager").train.step_mode == "eager"
