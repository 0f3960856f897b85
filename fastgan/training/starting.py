"""Start a run in a new folder, or resume the one in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastgan._checks import InputError
from fastgan._files import check_writable, locked_folder, write_text
from fastgan.data.datasets import is_named
from fastgan.data.folders import IMAGES, SKETCHES, has_sketches
from fastgan.distributed import current_world
from fastgan.recipes import AUTO, Recipe, differences, dump_recipe, override, override_values
from fastgan.training.checkpoint import Checkpoints
from fastgan.training.data_record import RECORD, DataRecord
from fastgan.training.fastest_mode import fastest_mode
from fastgan.training.run import Run
from fastgan.training.run_data import check_classes, describe_use, load_data_of, load_run_data, settle
from fastgan.training.run_folder import CONFIG, GENERATOR, METRICS, load_generator, run_recipe

# Settings that may change when a run is resumed: how far it goes, how its steps are run, what it reports, its names.
_FREE = ("train.steps", "train.step_mode", "log.", "name", "about")
_ALREADY = "{0} holds a run already: go on with --resume {0}, choose another folder, or add --overwrite"


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


def _check_outside_of_data(out: Path, recipe: Recipe) -> None:
    """Raise ``InputError`` if the run's own grids would be images of its data."""
    if is_named(recipe.data.source):
        return
    root = Path(recipe.data.source)
    for place in (root / IMAGES, root / SKETCHES) if has_sketches(root) else (root,):
        if out.resolve().is_relative_to(place.resolve()):
            raise InputError(f"out must not lie in the folder of images {place}, got {out}: its grids would join them")


def _recipe_of_own_folder(out: Path) -> Recipe:
    """Return the recipe of the run in ``out``, which may be removed. Raises ``InputError`` if it is not a run's."""
    try:
        return run_recipe(out)
    except InputError as error:
        raise InputError(
            f"{out / CONFIG} is not the configuration of a run, so nothing in {out} is removed: choose another "
            f"folder, or remove the file ({error})"
        ) from error


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


def _may_have_moved(out: Path, stored: Recipe, wanted: Recipe) -> bool:
    """Return whether both recipes read their data from files and the run has recorded those."""
    record = DataRecord.read(out)
    return (
        record is not None and bool(record.files) and not any(map(is_named, (stored.data.source, wanted.data.source)))
    )
