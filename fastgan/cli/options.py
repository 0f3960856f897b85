"""Options that the metric commands share, and how a command's numbers reach the user."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgan.cli.errors import printable, user_errors

if TYPE_CHECKING:
    from fastgan.distributed import World
    from fastgan.metrics.options import FeatureOptions


def not_empty(text: str) -> Path:
    """Return ``text`` as a path; refuse "", such as an unset shell variable, which would mean the current folder."""
    if not text:
        raise typer.BadParameter("it must not be empty")
    return Path(text)


MAX_SEED = (1 << 32) - 1

BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
NumWorkers = Annotated[
    int | None, typer.Option(min=0, help="Threads that decode images.  [default: one per core, at most 8]")
]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.  [default: cuda if available]")]
Dims = Annotated[
    str | None,
    typer.Option(help="Inception's features: 64, 192, 768, 2048, or spatial for sFID.  [default: 2048]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
BackboneName = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        help="inception, efficientnet_lite0, dinov2, clip, timm:NAME or torchvision:NAME.  "
        "[default: that of the statistics, else inception]",
    ),
]
ProtocolName = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        help="How images are resized and scaled for the network: pytorch-fid, clean-fid, torch-fidelity, torchmetrics "
        "or tensorflow.  [default: that of the statistics, else pytorch-fid for inception and clean-fid for others]",
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="Replace the protocol's resize method, which changes its name: clean, legacy_pytorch, legacy_tensorflow "
        "or bilinear_antialias."
    ),
]
Precision = Annotated[str, typer.Option(help="fp32, tf32, bf16, or auto: tf32 on GPUs that support it, else fp32.")]
Weights = Annotated[Path | None, typer.Option(help="The backbone's weights file.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip unreadable images and report their number.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Folder for unfinished statistics. After an interruption the same command resumes from it; it is emptied "
        "at the end."
    ),
]
Times = Annotated[
    bool,
    typer.Option(
        "--times", help="Print the seconds of decoding, resizing, the network and the statistics, and the bound."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
WithRoot = Annotated[
    bool,
    typer.Option(
        "--root",
        help="Also write a factor of the covariance, which saves time in each distance to these statistics and doubles "
        "the file: 32 MB more at 2048 features.",
    ),
]
Floor = Annotated[
    Path | None,
    typer.Option(
        parser=not_empty,
        metavar="PATH",
        help="Another split of the real images: also prints its distance to the real images, the best score to expect.",
    ),
]


def warn(line: str) -> None:
    """Print a line on stderr, in the first process of torchrun only."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(printable(f"fastgan: {line}"), err=True)


@contextmanager
def feature_options(given: Mapping[str, Any]) -> Iterator[tuple[FeatureOptions, World, Callable[[str], None]]]:
    """Yield the ``FeatureOptions`` of a command, its processes, and a print function that acts in the first of them.

    ``given`` holds the command's arguments by name; those that are no ``FeatureOptions`` are ignored. User errors in
    the block are printed as one line.
    """
    with user_errors():
        from fastgan._checks import InputError
        from fastgan.distributed import launched_world
        from fastgan.metrics.options import FeatureOptions

        shared = {f.name: given[f.name] for f in fields(FeatureOptions) if f.name in given}
        dims = shared.get("dims")
        if dims is not None:
            if not dims.isdecimal() and dims != "spatial":
                raise InputError(f"--dims must be 64, 192, 768, 2048 or spatial, got {dims}")
            shared["dims"] = int(dims) if dims.isdecimal() else dims
        options = FeatureOptions(**shared, note=warn)
        with launched_world(options.torch_device()) as world:
            yield options, world, typer.echo if world.is_first else _print_nothing


def _print_nothing(line: str) -> None:
    pass


def report(lines: Sequence[str], result: dict[str, Any], *, as_json: bool) -> str:
    """Return the output of a command: ``lines`` for people, or ``result`` as JSON."""
    return json.dumps(result) if as_json else printable("\n".join(lines))
