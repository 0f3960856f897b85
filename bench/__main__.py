"""``python -m bench``: run the suites, print one table per workload, write one JSON file per suite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.regressions import notes, regressions
from bench.session import SUITES, Session, load
from fastgan.bench.records import RecordError, read_run, results_folder
from fastgan.cli.errors import OneLineErrors

RESULTS = Path(__file__).parent / "results"
SECONDS = {"cpu": 3.0, "cuda": 1.0}
QUICK_SECONDS = 0.5


class BenchErrors(OneLineErrors):
    """Print usage errors in one line."""

    program = "python -m bench"


app = typer.Typer(cls=BenchErrors, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    suite: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SUITES)}; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, short timings.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"Timed seconds a workload  [default: 3 on a CPU, 1 on a GPU, {QUICK_SECONDS} with --quick].",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        float, typer.Option(min=0, help="Begin no workload after this many seconds.", show_default=False)
    ] = math.inf,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Run only implementations whose name contains PART; may be repeated."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Leave out implementations whose name contains PART; may be repeated."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Print ratios against this implementation  [default: each workload's reference]."
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="OLD.json NEW.json",
            help="List what NEW does worse than OLD beyond the noise; status 1 if anything.",
        ),
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Print workloads and implementations; run nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the JSON files  [default: bench/results/DEVICE].")
    ] = None,
) -> None:
    """Measure fastgan against its baselines in one process. Exits with status 1 if a reference or fastgan failed."""
    if context.invoked_subcommand:
        return
    if compare:
        raise typer.Exit(_compare(*compare))
    suites = suite or list(SUITES)
    _check_options(suites, device)
    if list_only or baseline:
        catalog = {name: {w.name: w.order for w in load(name, quick, device)} for name in suites}
        if list_only:
            return _print_catalog(catalog)
        names = sorted({name for found in catalog.values() for order in found.values() for name in order})
        if baseline not in names:
            raise typer.BadParameter(
                f"no workload has {baseline!r}; there are {'; '.join(names)}", param_hint="--baseline"
            )
    session = Session(
        folder=output or RESULTS / results_folder(device),
        quick=quick,
        device=device,
        seconds=seconds if seconds is not None else QUICK_SECONDS if quick else SECONDS[device],
        limit=limit,
        baseline=baseline,
        only=only or (),
        without=without or (),
    )
    failures = [failure for name in suites for failure in session.run_suite(name)]
    for failure in failures:
        typer.echo(failure, err=True)
    raise typer.Exit(1 if failures else 0)


@app.command()
def report(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; status 1 if a document is not up to date.")
    ] = False,
) -> None:
    """Make tables, plots and the README's results from the JSON files in bench/results."""
    from bench.report import check_report, write_report

    try:
        problems = check_report() if check else write_report()
    except RecordError as error:
        raise typer.BadParameter(str(error)) from None
    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(1 if problems else 0)


def _check_options(suites: list[str], device: str) -> None:
    unknown = sorted(set(suites) - set(SUITES))
    if unknown:
        raise typer.BadParameter(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}", param_hint="--suite")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda, got {device}", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is visible", param_hint="--device cuda")


def _print_catalog(catalog: dict[str, dict[str, list[str]]]) -> None:
    for suite, workloads in catalog.items():
        typer.echo(suite)
        for name, implementations in workloads.items():
            typer.echo(f"  {name}: {'; '.join(implementations)}")


def _compare(old: Path, new: Path) -> int:
    try:
        before, after = read_run(old), read_run(new)
        worse = regressions(before, after)
    except RecordError as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from None
    for note in notes(before, after):
        typer.echo(note)
    for line in worse:
        typer.echo(line)
    typer.echo(f"{len(worse)} regression{'' if len(worse) == 1 else 's'}")
    return 1 if worse else 0


if __name__ == "__main__":
    app(prog_name="python -m bench")
