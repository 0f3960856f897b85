"""Starting and resuming: what a folder may hold, what may change, and what is refused before anything is written."""

import os

import pytest
import torch

from fastgan._checks import InputError
from fastgan._files import locked_folder
from fastgan.training import scoring, starting
from fastgan.training.pictures import encoded
from fastgan.training.run_data import load_data_of
from fastgan.training.run_folder import load_generator
from tests.training.tiny_runs import PIXELS, assert_same, folder_of_images, resume, start, tiny

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("quick_features")


def test_two_programs_do_not_train_in_one_folder(tmp_path):
    run = start(tiny("dcgan", "steps=2"), tmp_path / "run")
    with locked_folder(tmp_path / "run"):
        for act in (run.train, lambda: start(tiny("dcgan", "seed=5"), tmp_path / "run", overwrite=True)):
            with pytest.raises(InputError, match=f"run is being written to by process {os.getpid()} on "):
                act()
    assert "seed: 0" in (tmp_path / "run" / "config.yaml").read_text()
    run.train()


def test_a_run_that_began_while_another_loaded_its_data_is_kept(tmp_path, monkeypatch):
    def slow(*args, **options):
        if not (tmp_path / "config.yaml").exists():
            monkeypatch.undo()
            monkeypatch.setattr(scoring, "load_backbone", lambda *_args, **_options: PIXELS)
            start(tiny("dcgan"), tmp_path).train()
        return load_data_of(*args, **options)

    monkeypatch.setattr(starting, "load_data_of", slow)
    with pytest.raises(InputError, match="holds a run already"):
        start(tiny("dcgan", "seed=5"), tmp_path)
    assert resume(tmp_path).recipe.train.seed == 0


def test_files_of_a_killed_program_are_removed(tmp_path):
    left = tmp_path / "checkpoints" / ".last-x7_a.pt"
    left.parent.mkdir()
    left.write_bytes(b"half")
    start(tiny("dcgan"), tmp_path).train()
    assert not left.exists()
    assert (left.parent / "last.pt").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_program_is_left_alone(tmp_path, overwrite):
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 3}\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "1.ckpt").write_text("precious")
    with pytest.raises(InputError, match="config.yaml is not the configuration of a run, so nothing in"):
        start(tiny("dcgan"), tmp_path, overwrite=overwrite)
    assert (tmp_path / "checkpoints" / "1.ckpt").read_text() == "precious"


@pytest.mark.parametrize("out", ["", "runs/a"])
def test_a_run_does_not_write_into_its_data(tmp_path, out):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encoded(torch.full((3, 16, 16), 40 * i, dtype=torch.uint8)))
    with pytest.raises(InputError, match="out must not lie in the folder of images .* its grids would join them"):
        start(tiny("dcgan", f"data.source={tmp_path}"), tmp_path / out)
    assert len(list(tmp_path.iterdir())) == 6
    start(tiny("dcgan", f"data.source={tmp_path}"), tmp_path / out, dry_run=True)


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    start(tiny("dcgan", "steps=2"), tmp_path).train()
    with pytest.raises(InputError, match="steps must be at least 2, which .* has done, got 1"):
        resume(tmp_path, overrides=["steps=1"])
    assert resume(tmp_path).recipe.train.steps == 2


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


def test_nothing_is_written_if_recipe_and_data_do_not_fit(tmp_path):
    out = tmp_path / "run"
    for change, match in (
        ("data.source=/no/such/folder", "/no/such/folder does not exist"),
        ("batch_size=5000", "batch_size must be from 1 to the number of images, 1198"),
        ("resolution=25", "resolution must be 4, 5, 6 or 7 times"),
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


def test_a_run_without_checkpoints_is_started_over(tmp_path):
    start(tiny("dcgan", "steps=5"), tmp_path).trainer.run(1)  # ends before the first checkpoint
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no checkpoint to go on from: .*; start the run again with --out"):
        resume(tmp_path)
    run = start(tiny("dcgan", "batch_size=8"), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    run.train()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert load_generator(tmp_path)[1] == 2


def test_overwrite_replaces_a_run_only_when_the_new_one_can_start(tmp_path):
    start(tiny("dcgan"), tmp_path).train()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="or add --overwrite"):
        start(tiny("dcgan"), tmp_path)
    with pytest.raises(InputError, match="batch_size must be"):
        start(tiny("dcgan", "batch_size=5000"), tmp_path, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    start(tiny("dcgan", "steps=7"), tmp_path, overwrite=True)
    assert not (tmp_path / "checkpoints").exists()
    assert "steps: 7" in (tmp_path / "config.yaml").read_text()


def test_a_run_with_only_its_best_checkpoint_is_resumed(tmp_path):
    run = start(tiny("dcgan", "steps=3"), tmp_path)
    run.trainer.run(2)
    run._save_best()
    assert resume(tmp_path).trainer.step == 2


def test_places_that_cannot_be_written_are_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.training.starting.load_data_of", None)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", tmp_path / "file", "/proc/run"):
        with pytest.raises(InputError, match=f"{place} cannot be written to: "):
            start(tiny("dcgan"), place)


def test_weights_of_another_run_or_generator(tmp_path):
    first = start(tiny("sagan", "steps=3"), tmp_path / "first")
    first.train()
    notes = []
    init = f"init={tmp_path / 'first'}"
    run = start(tiny("sagan", init, "lr_generator=1e-5", "seed=7"), tmp_path / "second", notes)
    assert run.trainer.step == 0
    for name in ("generator", "discriminator"):
        assert_same(getattr(run.trainer, name).state_dict(), getattr(first.trainer, name).state_dict())
    assert_same(run.generator.state_dict(), first.generator.state_dict())
    assert any("tensors of the discriminator are those of" in note for note in notes)
    run.train()
    assert_same(resume(tmp_path / "second").state_dict(), run.state_dict())
    folder_of_images(tmp_path / "d")
    source = (f"data.source={tmp_path / 'd'}", "held_out=0.25", "channels=1")
    notes.clear()
    run = start(tiny("sagan", f"init={tmp_path / 'first' / 'generator'}", *source), tmp_path / "third", notes)
    fresh = [note for note in notes if "these start from scratch" in note]  # three classes where there were ten
    assert fresh
    with pytest.raises(InputError, match="init must be of networks like the recipe's"):
        start(tiny("dcgan", init), tmp_path / "fourth")
    with pytest.raises(InputError, match="holds neither a run"):
        start(tiny("dcgan", f"init={tmp_path / 'd'}"), tmp_path / "fourth")
    assert not (tmp_path / "fourth").exists()
