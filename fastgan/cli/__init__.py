"""The ``fastgan`` command. A user's mistake is one line on stderr and exit status 2; a bug keeps its traceback.

Each group of commands is one module with ``register(app)``. What a command needs is imported inside it, so that
``fastgan --help`` starts quickly.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastgan.cli import metrics, training
from fastgan.cli.errors import OneLineErrors, user_errors

app = typer.Typer(
    cls=OneLineErrors,
    help="Train and score GANs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
metrics.register(app)
training.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastgan import __version__

        typer.echo(f"fastgan {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Faster attention, spectral norms, train steps and FID for GANs in PyTorch."""
    if "torch" not in sys.modules:  # OpenMP reads this when torch is loaded
        # On a busy machine, threads that spin while they wait take the processor from the thread that they wait for.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.png, samples.png and report.json.")] = Path("out/demo"),
) -> None:
    """Time the library against the usual code, and train and score a small GAN on real digits."""
    with user_errors():
        from fastgan.demo import run_demo

        run_demo(out)


@app.command()
def status() -> None:
    """Show which backends this machine can run, and why not the others."""
    from fastgan import backend_status

    typer.echo(str(backend_status()))
