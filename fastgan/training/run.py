"""A run: a folder with its configuration, checkpoints, metrics, grids and curves; started, interrupted, resumed."""

from __future__ import annotations

import errno
import logging
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fastgan import __version__
from fastgan._checks import InputError
from fastgan._files import check_writable, locked_folder, write_bytes, write_text
from fastgan.data import DataSplit, load_data
from fastgan.data.datasets import is_named
from fastgan.data.decode import Decoding
from fastgan.data.folders import IMAGES, SKETCHES, has_sketches
from fastgan.data.images import mostly_color
from fastgan.distributed import World, current_world
from fastgan.models import Generator
from fastgan.models.base import RUN_FOLDER
from fastgan.recipes import AUTO, Recipe, automatic, differences, dump_recipe, load_recipe, override, override_values
from fastgan.recipes.build import build_networks
from fastgan.training.checkpoint import BEST, LAST, Checkpoints, DiskFullError, read_checkpoint
from fastgan.training.compile_clock import CompileClock
from fastgan.training.data_record import RECORD, DataRecord
from fastgan.training.fastest_mode import fastest_mode
from fastgan.training.reports import MetricsLog, Scores, make_writers, samples_png
from fastgan.training.scoring import Score, Scorer, score_backbone
from fastgan.training.trainer import Callback, Every, NonFiniteLossError, ProgressBar, Trainer

_log = logging.getLogger(__name__)
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
CONFIG, METRICS, GENERATOR = "config.yaml", "metrics.jsonl", RUN_FOLDER

# Settings that may change when a run is resumed: how far it goes, how its steps are run, what it reports, its names.
_FREE = ("train.steps", "train.step_mode", "log.", "name", "about")


class RunError(InputError):
    """Training ended early; the message says why and how to go on."""


class Run:
    """A run in ``out``; make it with :func:`start_run` or :func:`resume_run`.

    If several processes train together, only the first scores and writes, and ``out`` is a folder that all see.

    Attributes:
        recipe: its configuration, in full.
        data: the images.
        trainer: networks, optimizers and loop.
        scores: distances so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        data: DataSplit,
        *,
        device: torch.device | str,
        tell: Callable[[str], None] = print,
        show_progress: bool = True,
        world: World | None = None,
    ) -> None:
        self.recipe, self.out, self.data = recipe, out, data
        self.world = current_world() if world is None else world
        self._tell, self._show_progress = tell, show_progress
        torch.manual_seed(recipe.train.seed)
        generator, discriminator = build_networks(recipe.model, data.train.n_classes, data.train.images.shape[1])
        if generator.n_classes:
            generator.class_names = data.train.class_names
        try:
            self.trainer = Trainer(
                generator, discriminator, data.train, recipe.train, images=recipe.data, device=device, world=self.world
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.checkpoints = Checkpoints(out / "checkpoints")
        with self.world.agreed():
            writers = make_writers(recipe, out) if self.world.is_first else ()
        self._metrics = MetricsLog(out / METRICS, writers)
        self._scores = Scores(recipe.log.score_every, self._make_scorer, self._metrics, self._save_best, tell)
        self._saved_step: int | None = None

    @property
    def scores(self) -> list[Score]:
        return self._scores.history

    def train(self) -> signal.Signals | None:
        """Train to the last step, or until Ctrl-C or SIGTERM, which is then returned; the state is saved either way.

        A signal to one of several processes stops them all.

        Raises:
            RunError: a loss is not finite, or the disk is full; the last good checkpoint is kept.
            InputError: another program trains in the same folder.
        """
        log = self.recipe.log
        callbacks: list[Callback] = [StopOnSignal()]
        if self.world.is_first:
            callbacks += [
                *([ProgressBar()] if self._show_progress else []),
                self._metrics,
                self._scores,
                Every(log.grid_every, self._draw, at_end=True, early=True),
                Every(log.checkpoint_every, self._save, at_end=True),
            ]
        done, steps = self.trainer.step, self.recipe.train.steps
        if done >= steps:
            self._tell(f"{self.out} is finished, {done} of {steps} steps are done: steps={2 * done} would train on")
        elif self.trainer.steps.mode != "eager":
            callbacks.append(CompileClock(self._tell))
        try:
            with ExitStack() as stack:
                with self.world.agreed():
                    if self.world.is_first:
                        stack.enter_context(locked_folder(self.out))
                        self.checkpoints.remove_temporary_files()
                if not done and self.world.is_first:
                    self._draw(self.trainer)
                self.trainer.run(callbacks=callbacks)
                if self.world.is_first:
                    self._save(self.trainer)
        except NonFiniteLossError as error:
            if self.world.is_first and 0 < self.trainer.step < error.step:
                self._save(self.trainer)
            other = f"begin with its weights and other settings by --init {shlex.quote(str(self.out))} --out ..."
            raise RunError(
                f"{error}. {self._how_to_go_on}{'' if self._saved_step is None else f'; {other}'}"
            ) from error
        except OSError as error:
            if isinstance(error, DiskFullError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RunError(f"the disk is full: {error}. {self._how_to_go_on}") from error
            raise
        number = max(self.world.gather(self.trainer.stop_signal))
        return signal.Signals(number) if number else None

    def try_out(self, steps: int = 3) -> None:
        """Do a few steps without callbacks, and report networks, memory and the time that all steps will take."""
        trainer, recipe = self.trainer, self.recipe
        for name, network in (("generator", trainer.generator), ("discriminator", trainer.discriminator)):
            weights = sum(p.numel() for p in network.parameters())
            self._tell(f"{name}: {type(network).__name__}, {weights:,} weights")
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            try:
                trainer.train_step()
                trainer.flush()  # waits for the device
            except NonFiniteLossError as error:
                raise RunError(str(error)) from error
            seconds.append(time.perf_counter() - began)
        if trainer.device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated(trainer.device) / 1e9:.2f} GB on {trainer.device}"
        else:
            memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e9:.2f} GB of the process"
        self._tell(f"peak memory: {memory}")
        whole = min(seconds[1:]) * recipe.train.steps + seconds[0]
        self._tell(
            f"first step {seconds[0]:.2f} s, then {min(seconds[1:]):.3f} s per step: {recipe.train.steps} steps take "
            f"about {timedelta(seconds=round(whole))} without scores, grids and checkpoints; nothing was written"
        )

    def _draw(self, trainer: Trainer) -> None:
        """Write ``grids/<step>.png`` from the moving average, and ``curves.png``."""
        sketches, seed = self.recipe.data.sketches, self.recipe.train.seed
        grid = samples_png(self.generator, self.data.held_out, sketches=sketches, seed=seed)
        write_bytes(self.out / "grids" / f"{trainer.step:06d}.png", grid)
        trainer.flush()
        write_bytes(self.out / "curves.png", self._scores.curves_png(trainer.history))

    def _save(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.step:
            self.checkpoints.save(self.state_dict())
            self._saved_step = trainer.step
            self.generator.save_pretrained(self.out / GENERATOR)

    def _save_best(self) -> None:
        self.checkpoints.save_best(self.state_dict())

    @property
    def generator(self) -> Generator:
        """The moving average of the generator."""
        assert isinstance(self.trainer.ema.module, Generator)
        return self.trainer.ema.module

    @property
    def resume_command(self) -> str:
        return f"fastgan train --resume {shlex.quote(str(self.out))}"

    def state_dict(self) -> dict[str, Any]:
        """Contents of a checkpoint."""
        scores = [{"step": score.step, "distances": score.distances} for score in self.scores]
        return {
            "trainer": self.trainer.state_dict(),
            "generator": self.generator.description,
            "scores": scores,
            "fastgan": __version__,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self._scores.history = [Score(row["step"], dict(row["distances"])) for row in state["scores"]]
        self._saved_step = self.trainer.step

    def _make_scorer(self) -> Scorer:
        data = self.data
        scorer = Scorer(
            data.held_out,
            data.train,
            self.recipe.log.score_sizes,
            backbone=score_backbone(self.recipe),
            device=self.trainer.device,
            sketches=self.recipe.data.sketches,
        )
        floors = ", ".join(f"{value:.2f} (N = {n})" for n, value in scorer.floors.items())
        how = f"protocol {scorer.protocol}, precision {scorer.backbone.precision}"
        self._tell(f"{scorer.label} of real training images to held-out ones ({how}): {floors}")
        return scorer

    @property
    def _how_to_go_on(self) -> str:
        if self._saved_step is None:
            return "No checkpoint had been written; the same command starts the run over."
        return f"The checkpoint of step {self._saved_step} is kept: {self.resume_command}"


class StopOnSignal(Callback):
    """Ends the training after the current step on Ctrl-C or SIGTERM; a second one ends the program at once."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def on_start(self, trainer: Trainer, steps: int) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            trainer.stop_signal = number
            trainer.stop_requested = True
            self._restore()

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, handle)
            except ValueError:  # not in the main thread, where signals cannot be handled
                return

    def on_end(self, trainer: Trainer) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


def start_run(
    recipe: Recipe,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    tell: Callable[[str], None] = print,
    show_progress: bool = True,
    restarted: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Run:
    """Start a run: load the data, build the networks, and write ``config.yaml`` and ``data.json``.

    Settings of "auto" are replaced by the values that follow from the data. A run in ``out`` that ended before its
    first checkpoint is started over.

    Args:
        recipe: the system.
        out: folder of the run.
        device: where to train.
        tell: called with each line to report.
        show_progress: draw a progress bar.
        restarted: a supervisor has restarted the program. If ``out`` holds the same run, it is resumed.
        overwrite: remove a run in ``out`` before the first step.
        dry_run: write nothing, and ignore a run in ``out``.

    Raises:
        InputError: ``out`` holds a run with checkpoints already or files of another program, lies in the data's folder,
            or cannot be written to; or the recipe, the data and the networks do not fit.
    """
    out, world = Path(out), current_world()
    recipe = _with_absolute_paths(recipe)
    exists = any(world.gather((out / CONFIG).exists()))  # before the first process writes it
    begun = any(world.gather(Checkpoints(out / "checkpoints").exist()))
    if exists and not dry_run:
        stored = _recipe_of_own_folder(out)
    if exists and begun and not overwrite and not dry_run:
        if restarted and not differences(stored, _without_auto(recipe, stored)):
            return resume_run(out, device=device, tell=tell, show_progress=show_progress)
        raise InputError(_ALREADY.format(out))
    if not dry_run:
        _check_outside_of_data(out, recipe)
    with world.agreed():
        if world.is_first:
            check_writable(out)
    data = load_data_of(recipe, world, tell)
    tell(data.found)
    for note in data.notes:
        tell(f"note: {note}")
    settled = settle(recipe, data)
    check_classes(settled, data)
    tell(describe_use(settled, data))
    if settled.train.step_mode == AUTO and torch.device(device).type == "cpu" and world.size == 1:
        mode = fastest_mode(settled, data.train, tell=tell)
        if mode != "eager":  # what "auto" is on a CPU
            settled = replace(settled, train=replace(settled.train, step_mode=mode))
    recipe = replace(settled, log=replace(settled.log, tensorboard=False, wandb=False)) if dry_run else settled
    run = Run(recipe, out, data, device=device, tell=tell, show_progress=show_progress)
    if recipe.train.init:
        begin_with(run, Path(recipe.train.init), tell)
    with world.agreed():
        if world.is_first and not dry_run:
            with locked_folder(out):
                if (out / CONFIG).exists():
                    # Another program may have written a run while this one loaded its data.
                    if run.checkpoints.exist() and not overwrite:
                        raise InputError(_ALREADY.format(out))
                    _remove_run(out)
                write_text(out / CONFIG, dump_recipe(recipe))
                DataRecord.of(data).write(out)
    return run


_ALREADY = "{0} holds a run already: go on with --resume {0}, choose another folder, or add --overwrite"


def _check_outside_of_data(out: Path, recipe: Recipe) -> None:
    """Raise ``InputError`` if the run's own grids would be images of its data."""
    if is_named(recipe.data.source):
        return
    root = Path(recipe.data.source)
    for place in (root / IMAGES, root / SKETCHES) if has_sketches(root) else (root,):
        if out.resolve().is_relative_to(place.resolve()):
            raise InputError(f"out must not lie in the folder of images {place}, got {out}: its grids would join them")


def _recipe_of_own_folder(out: Path) -> Recipe:
    """Configuration of the run in ``out``, whose files may be removed. Raises ``InputError`` if another program's."""
    try:
        return run_recipe(out)
    except InputError as error:
        raise InputError(
            f"{out / CONFIG} is not the configuration of a run, so that nothing in {out} is removed: choose another "
            f"folder, or remove the file ({error})"
        ) from error


def begin_with(run: Run, folder: Path, tell: Callable[[str], None]) -> None:
    """Copy the weights of a run's last checkpoint or of a saved generator, wherever names and shapes agree.

    Optimizers, average count, step and data order start from scratch.

    Raises:
        InputError: ``folder`` holds neither, or less than half of the tensors of a network fit.
    """
    trainer = run.trainer
    if (folder / CONFIG).is_file():
        state = Checkpoints(folder / "checkpoints").load(tell, trainer.device)["trainer"]
        found = {"generator": state["generator"], "discriminator": state["discriminator"], "average": state["ema"]}
    else:
        weights = load_generator(folder, device=trainer.device)[0].state_dict()
        found = {"generator": weights, "average": weights}
    networks = {"generator": trainer.generator, "discriminator": trainer.discriminator, "average": trainer.ema.module}
    for name, weights in found.items():
        own = networks[name].state_dict()
        fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
        if 2 * len(fitting) < len(own):
            raise InputError(
                f"init must be of networks like the recipe's: {len(fitting)} of the {len(own)} tensors of the {name} "
                f"fit {folder}"
            )
        networks[name].load_state_dict(own | fitting)
        left = [key for key in own if key not in fitting]
        others = f"; these start from scratch: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}" if left else ""
        tell(f"init: {len(fitting)} of {len(own)} tensors of the {name} are those of {folder}{others}")


def _remove_run(out: Path) -> None:
    """Remove the files of a run, checkpoints last, and leave others in its folder alone."""
    for name in (CONFIG, RECORD, METRICS, "curves.png", "classifier.json", "classifier.safetensors"):
        (out / name).unlink(missing_ok=True)
    for name in ("grids", "tensorboard", GENERATOR, "checkpoints"):
        shutil.rmtree(out / name, ignore_errors=True)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make the paths of ``recipe`` absolute, so that a run may be resumed from any folder."""
    if recipe.train.init:
        recipe = replace(recipe, train=replace(recipe.train, init=str(Path(recipe.train.init).absolute())))
    if is_named(recipe.data.source):
        return recipe
    return replace(recipe, data=replace(recipe.data, source=str(Path(recipe.data.source).absolute())))


def _without_auto(recipe: Recipe, stored: Recipe) -> Recipe:
    """Replace each "auto" of ``recipe`` by the value of ``stored``."""
    values = {key: now for key, (now, then) in differences(stored, recipe).items() if then in (None, AUTO)}
    return override_values(recipe, values)


def settle(recipe: Recipe, data: DataSplit) -> Recipe:
    """Replace each "auto" of ``recipe`` by the value that follows from the data."""
    decided = {
        "data.flip": mostly_color(data.train.images),
        "data.sketches": data.sketches,
        "model.resolution": data.train.images.shape[-1],
        "model.sees_sketch": data.sketches in ("edges", "paired"),
    }
    return override_values(recipe, {key: decided[key] for key in automatic(recipe)})


def resume_run(
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
    tell: Callable[[str], None] = print,
    show_progress: bool = True,
) -> Run:
    """Continue the run in ``out`` from its last checkpoint.

    Args:
        out: the run's folder.
        recipe: expected configuration of the run; None takes it from the folder.
        overrides: ``key=value``. Only ``train.steps``, ``train.step_mode`` and the section ``log`` may change, and
            ``data.source`` if the same files have moved.
        device, tell, show_progress: as in :func:`start_run`.

    Raises:
        InputError: there is no run, no checkpoint that can be read, more steps are done than wanted, the configuration
            differs (the keys are named), or the images do (the files are named).
    """
    out, world = Path(out), current_world()
    stored = run_recipe(out)
    wanted = override(stored if recipe is None else recipe, overrides)
    wanted = _without_auto(_with_absolute_paths(wanted), stored)
    free = (*_FREE, "data.source") if _may_have_moved(out, stored, wanted) else _FREE
    changed = {key: values for key, values in differences(stored, wanted).items() if not key.startswith(free)}
    if changed:
        listed = "; ".join(f"{key} is {old!r} in the run, {new!r} was asked for" for key, (old, new) in changed.items())
        raise InputError(f"{out} was begun with another configuration: {listed}")
    wanted = replace(wanted, name=stored.name, about=stored.about)
    with world.agreed():
        if world.is_first:
            check_writable(out)
    data = load_run_data(out, wanted, world)
    run = Run(wanted, out, data, device=device, tell=tell, show_progress=show_progress)
    try:
        run.load_state_dict(run.checkpoints.load(tell, run.trainer.device))
    except InputError as error:
        if run.checkpoints.exist():
            raise
        raise InputError(f"{error}; start the run again with --out {out}") from error
    except (ValueError, RuntimeError) as error:
        details = " ".join(str(error).split())
        raise InputError(f"the checkpoint in {out} does not fit its configuration or data: {details[:300]}") from error
    if run.trainer.step > wanted.train.steps:
        raise InputError(f"steps must be at least {run.trainer.step}, which {out} has done, got {wanted.train.steps}")
    world.gather(None)  # until all have read
    if world.is_first:
        write_text(out / CONFIG, dump_recipe(wanted))
    return run


def _may_have_moved(out: Path, stored: Recipe, wanted: Recipe) -> bool:
    """Return whether both recipes read their data from files and the run has recorded those."""
    record = DataRecord.read(out)
    return (
        record is not None and bool(record.files) and not any(map(is_named, (stored.data.source, wanted.data.source)))
    )


def run_recipe(out: str | Path) -> Recipe:
    """Configuration of the run in ``out``. Raises ``InputError`` if there is none."""
    path = Path(out) / CONFIG
    if not path.is_file():
        raise InputError(f"{out} holds no run: {path} does not exist")
    return load_recipe(path)


def load_generator(
    folder: str | Path, *, checkpoint: str = "best", device: torch.device | str = "cpu"
) -> tuple[Generator, int | None]:
    """Load the generator of a run, its moving average, or one that ``save_pretrained`` wrote.

    Args:
        folder: of the run, or with ``config.json`` and ``model.safetensors``.
        checkpoint: of a run: "best" by its scores (the last if none was kept), or "last".
        device: where to put it.

    Returns:
        The generator in eval mode, and the steps that it was trained for if known.

    Raises:
        InputError: there is neither, or it cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds neither a run (config.yaml) nor a saved generator (config.json)")
        return Generator.from_pretrained(folder, device=device), None
    if checkpoint not in ("best", "last"):
        raise InputError(f"checkpoint must be 'best' or 'last', got {checkpoint!r}")
    path = folder / "checkpoints" / (BEST if checkpoint == "best" else LAST)
    path = path if path.exists() else path.with_name(LAST)
    state = read_checkpoint(path)
    try:
        generator = Generator.from_description(state["generator"])
        generator.load_state_dict(state["trainer"]["ema"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not hold a generator: {' '.join(str(error).split())[:200]}") from error
    return generator.to(device).eval(), int(state["trainer"]["step"])


def load_run_data(out: str | Path, recipe: Recipe, world: World | None = None) -> DataSplit:
    """Load the data of the run in ``out``, and compare its files with those recorded.

    Raises:
        InputError: as ``load_data``, or the files differ.
    """
    source = recipe.data.source
    if not is_named(source) and not Path(source).exists():
        raise InputError(f"{source}, the data of {out}, does not exist: give the new place of the same files by --data")
    data = load_data_of(recipe, world)
    record = DataRecord.read(out)
    if record is not None:
        record.check(data, source, out)
    return data


def check_classes(recipe: Recipe, data: DataSplit) -> None:
    """Raise ``InputError`` for a conditional recipe on one class, except for one from sketches."""
    model = recipe.model
    if not model.conditional or model.architecture == "sketch" or data.train.n_classes > 1:
        return
    unconditional = "model.conditional=false" if model.head in ("plain", "projection") else "a recipe such as dcgan"
    raise InputError(
        f"recipe {recipe.name} needs at least two classes, {recipe.data.source} has one: make each class a folder, or "
        f"take {unconditional} for images without classes" + "".join(f" ({note})" for note in data.notes)
    )


def describe_use(recipe: Recipe, data: DataSplit) -> str:
    """Describe how the run uses its data, including all settings that follow from the data."""
    size = recipe.model.resolution
    parts = [f"{len(data.train)} to train on, {len(data.held_out)} held out, at {size}x{size}"]
    parts += ["mirrored at random"] if recipe.data.flip else ["not mirrored"]
    if recipe.model.architecture == "sketch":
        sees = ", which the discriminator sees" if recipe.model.sees_sketch else ", which only the generator sees"
        kind = {"edges": "edge maps as sketches", "paired": "each with its sketch", "unpaired": "sketches of the class"}
        parts.append(kind.get(recipe.data.sketches, "no sketches") + sees)
    return "; ".join(parts)


def load_data_of(recipe: Recipe, world: World | None = None, tell: Callable[[str], None] = _log.warning) -> DataSplit:
    """Load the images that a recipe names, at its resolution. Raises ``InputError`` as ``load_data``.

    With several processes, the first one loads before the others, so that only it downloads.
    """
    data, world = recipe.data, world or World()
    loaded: list[DataSplit] = []
    for turn in (world.is_first, not world.is_first):
        with world.agreed():
            if turn:
                how: dict[str, Any] = {
                    name: getattr(data, name) for name in ("channels", "sketches", "held_out", "skip_bad", "fit")
                }
                decoding = Decoding(data.background, orient=True, value_range=data.value_range)
                loaded.append(load_data(data.source, recipe.model.resolution, decoding=decoding, tell=tell, **how))
    return loaded[0]
