"""``python -m bench``: run the suites, print a table, write one JSON for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.harness import SUITES, Record, load, run, save

RESULTS = Path(__file__).parent / "results"


def main(
    suite: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SUITES)}; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes, short timings.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    seconds: Annotated[float, typer.Option(help="Measured time of each workload.")] = 3.0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the JSON files [default: bench/results/DEVICE].")
    ] = None,
) -> None:
    """Measure fastgan against eager references."""
    unknown = set(suite or ()) - set(SUITES)
    if unknown:
        raise typer.BadParameter(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: no CUDA device is visible")
    console = Console()
    folder = output or RESULTS / device
    for name in suite or SUITES:
        records: list[Record] = []
        for workload in load(name, quick, device):
            with console.status(f"{name}: {workload.name}"):
                found = run(name, workload, 1.0 if quick else seconds)
            console.print(_table(found))
            for record in found:
                if record.failure:
                    console.print(f"  {record.implementation}: {record.failure}", style="dim", highlight=False)
            records += found
        path = folder / f"{name}{'-quick' if quick else ''}.json"
        save(records, path, device, quick)
        console.print(f"{name}: {path}")


def _table(records: list[Record]) -> Table:
    slowest = next((r.median for r in records if r.median), None)
    table = Table("implementation", "median", "20 %", "80 %", "times reference", "error", title=records[0].workload)
    for r in records:
        if r.median is None or r.low is None or r.high is None:
            table.add_row(r.implementation, "-")
            continue
        error = "" if r.error is None else f"{r.error:.1e}"
        ratio = f"{slowest / r.median:.2f}" if slowest else ""
        table.add_row(r.implementation, *(f"{1e3 * t:.2f} ms" for t in (r.median, r.low, r.high)), ratio, error)
    return table


if __name__ == "__main__":
    typer.run(main)
