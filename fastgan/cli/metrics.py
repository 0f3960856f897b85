"""``fastgan fid`` and ``fastgan stats``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgan.cli.errors import user_errors

if TYPE_CHECKING:
    from fastgan.metrics import FeatureStats
    from fastgan.metrics.compare import Comparison

stats_app = typer.Typer(
    help="Look at and join files of feature statistics.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add the commands of this module to ``app``."""
    app.command()(fid)
    app.add_typer(stats_app, name="stats")


def fid(
    a: Annotated[Path, typer.Argument(help="A folder of images, or an .npz file of statistics.")],
    b: Annotated[Path, typer.Argument(help="The same; with --save-stats the .npz file to write.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Threads that decode images.  [default: one per core, at most 8]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.  [default: cuda where there is one]")] = None,
    dims: Annotated[int | None, typer.Option(help="Features per image; must be the backbone's.")] = None,
    save_stats: Annotated[
        bool, typer.Option("--save-stats", help="Write the statistics of folder A to the file B.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    backbone: Annotated[
        str | None,
        typer.Option(help="inception or efficientnet_lite0.  [default: inception where its weights are at hand]"),
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="clean or legacy_pytorch.  [default: that of the statistics given, else clean]")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    weights: Annotated[Path | None, typer.Option(help="The backbone's weights file.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unreadable images and count them.")] = False,
) -> None:
    """The Frechet distance of two sets of images; the FID where the features are Inception's."""
    with user_errors():
        from fastgan.metrics.compare import FeatureOptions, compare, compute_and_save

        options = FeatureOptions(
            backbone=backbone,
            weights=weights,
            resize=resize,
            precision=precision,
            device=device,
            dims=dims,
            batch_size=batch_size,
            num_workers=num_workers,
            skip_bad=skip_bad,
            note=lambda line: typer.echo(f"fastgan: {line}", err=True),
        )
        if save_stats:
            stats = compute_and_save(a, b, options)
            typer.echo(json.dumps({"file": str(b), **_summary(stats)}) if as_json else f"{b}: {_describe(stats)}")
            return
        _print_comparison(compare(a, b, options), as_json=as_json)


@stats_app.command("show")
def stats_show(
    file: Annotated[Path, typer.Argument(help="An .npz file of statistics.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a file of statistics holds."""
    with user_errors():
        from fastgan.metrics import FeatureStats

        summary = _summary(FeatureStats.load(file))
    typer.echo(json.dumps(summary) if as_json else "\n".join(f"{key}: {value}" for key, value in summary.items()))


@stats_app.command("merge")
def stats_merge(
    files: Annotated[list[Path], typer.Argument(help="Files of statistics with their n.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz file to write.")],
) -> None:
    """Join statistics of disjoint sets of images into those of all of them."""
    with user_errors():
        from fastgan.metrics.compare import merge_files

        merged = merge_files(files)
        merged.save(output)
    typer.echo(f"{output}: {_describe(merged)}")


def _print_comparison(result: Comparison, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    for path, stats, skipped in zip(result.paths, result.stats, result.skipped, strict=True):
        left_out = f", {len(skipped)} unreadable left out" if skipped else ""
        typer.echo(f"{path}: {_describe(stats)}{left_out}")
    typer.echo(f"{result.label}:  {result.distance}")


def _describe(stats: FeatureStats) -> str:
    n = "N unknown" if stats.n is None else f"N = {stats.n}"
    return f"{n}, backbone {stats.backbone or 'unknown'} ({stats.dim} features), resize {stats.resize or 'unknown'}"


def _summary(stats: FeatureStats) -> dict[str, object]:
    return {
        "n": stats.n,
        "dim": stats.dim,
        "backbone": stats.backbone,
        "resize": stats.resize,
        "dtype": stats.dtype,
        "factor": stats.factor is not None,
        "mean_norm": stats.mean.norm().item(),
        "trace": stats.cov.trace().item(),
    }
