"""``fastgan train``, ``fastgan recipes`` and ``fastgan sample``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgan.cli.errors import user_errors
from fastgan.cli.options import MAX_SEED, Quiet

if TYPE_CHECKING:
    import torch


def register(app: typer.Typer) -> None:
    """Add the commands of this module to ``app``."""
    app.command()(train)
    app.command()(recipes)
    app.command()(sample)


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value ...", help="Settings of the recipe to change.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A name of `fastgan recipes`, or a YAML file.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, photos, cifar10, torchvision:NAME, huggingface:NAME, or a folder, archive or array file of "
            "images; with --resume the new location of the same files.  [default: the recipe's]"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of the run to resume.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu.  [default: cuda if available]")] = None,
    quiet: Quiet = False,
    init: Annotated[Path | None, typer.Option(help="Run or saved generator to take the initial weights from.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load the data, do a few steps, predict memory and time; write nothing.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and count them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove a run that --out holds already.")] = False,
) -> None:
    """Train a GAN, or resume a run. Ctrl-C and SIGTERM save it and print how to resume.

    On several devices: torchrun --nproc-per-node K -m fastgan train ...; batch_size is the total over all devices.
    """
    with user_errors():
        from fastgan._checks import InputError
        from fastgan.distributed import launched_world
        from fastgan.recipes import load_recipe, override
        from fastgan.training.starting import resume_run, start_run

        changes = [*(overrides or []), *([f"data.source={json.dumps(data)}"] if data is not None else [])]
        changes += ["data.skip_bad=true"] if skip_bad else []
        changes += [f"train.init={json.dumps(str(init))}"] if init is not None else []
        if dry_run:
            out = Path("dry-run") if out is None else out
        if dry_run and resume is not None:
            raise InputError("--dry-run is for a new run and cannot be combined with --resume")
        if (resume is None) == (out is None):
            raise InputError("give either --out for a new run, or --resume for an existing one")
        if resume is not None and overwrite:
            raise InputError("--overwrite is for a new run in --out and cannot be combined with --resume")
        chosen = None if recipe is None else load_recipe(recipe)
        target = _own_device(device)
        with launched_world(target) as world:
            echo = typer.echo if world.is_first else lambda _: None
            options: dict[str, Any] = {"device": target, "tell": echo, "show_progress": not quiet and world.is_first}
            if resume is not None:
                run = resume_run(resume, recipe=chosen, overrides=changes, **options)
            else:
                if chosen is None:
                    raise InputError("--recipe must be given for a new run: see `fastgan recipes`")
                assert out is not None
                # Under torchrun --max-restarts the same command comes again.
                restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
                run = start_run(
                    override(chosen, changes), out, restarted=restarted, overwrite=overwrite, dry_run=dry_run, **options
                )
            if dry_run:
                run.try_out()
                return
            received = run.train()
    if received is not None:
        echo(f"{received.name}: saved step {run.trainer.step}. Resume with:\n{run.resume_command}")
        raise typer.Exit(128 + received)
    echo(f"{run.out}: {run.trainer.step} steps done, generator in {run.out / 'generator'}")


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, or YAML file, with all its settings.")] = None,
) -> None:
    """List the recipes that come with fastgan, or print one with a comment on each setting."""
    with user_errors():
        from fastgan.recipes import available, explain_recipe, load_recipe

        if name is not None:
            typer.echo(explain_recipe(load_recipe(name)), nl=False)
            return
        names = available()
        width = max(map(len, names))
        for each in names:
            typer.echo(f"{each:<{width}}  {load_recipe(each).about}")


def sample(
    source: Annotated[Path, typer.Argument(help="A run's folder, or one written by save_pretrained.")],
    out: Annotated[Path, typer.Option(help="The .png, .jpg or .webp to write; with -n the folder for PNG files.")],
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Write this many single images, all classes in turn.")
    ] = None,
    label: Annotated[str | None, typer.Option("--class", help="Only this class, by name or number.")] = None,
    by_class: Annotated[bool, typer.Option("--by-class", help="With -n: a folder per class.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With -n: remove the samples in --out first.")] = False,
    columns: Annotated[int, typer.Option(min=2, help="Images per row of the grid.")] = 8,
    truncation: Annotated[
        float | None, typer.Option(help="Bound of the noise, such as 0.8: less variety, fewer bad images.")
    ] = None,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Interpolate between two noise vectors in each row.")
    ] = False,
    sketches: Annotated[Path | None, typer.Option(help="Folder of sketches, for a generator that needs them.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed of the noise.")] = 0,
    checkpoint: Annotated[str, typer.Option(help="Checkpoint of a run: best or last.")] = "best",
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu.  [default: cuda if available]")] = None,
) -> None:
    """Write images from a trained generator: a grid, or a folder of PNG files for `fastgan fid`."""
    with user_errors():
        from fastgan.training.export import SampleOptions, write_samples

        options = SampleOptions(
            n=n,
            label=label,
            columns=columns,
            truncation=truncation,
            interpolate=interpolate,
            sketches=sketches,
            seed=seed,
            checkpoint=checkpoint,
            device=_device(device),
            by_class=by_class,
            overwrite=overwrite,
        )
        written = write_samples(source, out, options)
    typer.echo(written)


def _device(name: str | None) -> str:
    import torch

    from fastgan._checks import InputError

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def _own_device(name: str | None) -> torch.device:
    """Return the device of this process; each process of torchrun has its own GPU."""
    import torch

    from fastgan._checks import InputError
    from fastgan.distributed import local_device

    device = torch.device(_device(name))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda" or processes == 1:
        return device
    if device.index is not None:
        raise InputError(f"--device must be cuda or cpu if torchrun starts several processes, got {name}")
    if processes > torch.cuda.device_count():
        raise InputError(
            f"--nproc-per-node must be at most the number of GPUs, {torch.cuda.device_count()}, got {processes}"
        )
    return local_device()
