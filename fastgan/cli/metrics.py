"""``fastgan fid``, ``fastgan evaluate`` and ``fastgan stats``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgan.cli.errors import user_errors
from fastgan.cli.options import (
    MAX_SEED,
    AsJson,
    BackboneName,
    BatchSize,
    Checkpoint,
    Device,
    Dims,
    Floor,
    NumWorkers,
    Precision,
    ProtocolName,
    Quiet,
    Resize,
    SkipBad,
    Times,
    Weights,
    WithRoot,
    feature_options,
    not_empty,
    report,
    warn,
)

if TYPE_CHECKING:
    from fastgan.data.image_sources import ImageSource
    from fastgan.metrics import FeatureStats
    from fastgan.metrics.features import Measured

stats_app = typer.Typer(
    help="Write, show and merge files of feature statistics.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add the commands of this module to ``app``."""
    app.command()(fid)
    app.command()(evaluate)
    app.add_typer(stats_app, name="stats")


def fid(
    a: Annotated[
        Path,
        typer.Argument(
            parser=not_empty, help="Images: a folder, or a zip, npz, npy or pt file. Or an .npz file of statistics."
        ),
    ],
    b: Annotated[
        Path, typer.Argument(parser=not_empty, help="What to compare with; with --save-stats, the .npz file to write.")
    ],
    save_stats: Annotated[
        bool, typer.Option("--save-stats", help="Write the statistics of the images A to the file B.")
    ] = False,
    root: WithRoot = False,
    as_json: AsJson = False,
    floor: Floor = None,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = None,
    device: Device = None,
    dims: Dims = None,
    backbone: BackboneName = None,
    protocol: ProtocolName = None,
    resize: Resize = None,
    precision: Precision = "auto",
    weights: Weights = None,
    skip_bad: SkipBad = False,
    checkpoint: Checkpoint = None,
    times: Times = False,
    quiet: Quiet = False,
) -> None:
    """Print the Frechet distance between two sets of images: the FID if the features are Inception's."""
    given = locals()
    if save_stats:
        _save(a, b, given, root=root, as_json=as_json)
        return
    with feature_options(given) as (options, world, echo):
        from fastgan.metrics.catalog import EvaluateOptions
        from fastgan.metrics.evaluate import evaluate as measure

        result = measure(a, b, options, EvaluateOptions(("fid",)), floor=floor, world=world)
        lines = [*(result.times() if times else []), *result.lines()]
        echo(report(lines, result.as_dict(), as_json=as_json))
        result.finish()


def evaluate(
    sets: Annotated[
        list[Path],
        typer.Argument(
            parser=not_empty,
            help="The generated images or a training run, then the real images. A run knows its real images. With "
            "--against, any number of sets of generated images.",
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            parser=not_empty,
            metavar="PATH",
            help="The real images; ranks all sets against them in one table, best first.",
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="With --against: write the table to this .csv file.")] = None,
    latex: Annotated[Path | None, typer.Option(help="With --against: write the table to this .tex file.")] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Any of fid, fid-infinity, kid, is, prdc, sfid, mifid, cmmd, authpct, ct, fld, vendi, intra-fid, "
            "separated by commas; or all, which reports what is left out and why."
        ),
    ] = "fid,kid,prdc",
    plot: Annotated[
        Path | None, typer.Option(help="Plot the distance over the number of images to this .png, .svg or .pdf file.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write one self-contained HTML page of the results, with pictures, to this file."),
    ] = None,
    floor: Floor = None,
    subsets: Annotated[int, typer.Option(help="Number of KID subsets.")] = 100,
    subset_size: Annotated[int, typer.Option(help="Images per KID subset; all images if there are fewer.")] = 1000,
    splits: Annotated[int, typer.Option(help="Number of splits of the inception score.")] = 10,
    classify: Annotated[
        bool,
        typer.Option(
            help="For a training run with classes: score its samples with a classifier trained on its real images."
        ),
    ] = True,
    truncation: Annotated[
        float | None, typer.Option(help="For a training run: truncate the noise to plus or minus this value.")
    ] = None,
    sample_seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="For a training run: random seed of the noise.")
    ] = 1,
    standing_statistics: Annotated[
        int,
        typer.Option(min=0, help="For a training run: recompute batch-norm statistics over this many batches of 64."),
    ] = 0,
    k: Annotated[int, typer.Option("-k", help="k for precision, recall, density and coverage.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")] = 0,
    as_json: AsJson = False,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = None,
    device: Device = None,
    dims: Dims = None,
    backbone: BackboneName = None,
    protocol: ProtocolName = None,
    resize: Resize = None,
    precision: Precision = "auto",
    weights: Weights = None,
    skip_bad: SkipBad = False,
    checkpoint: Checkpoint = None,
    times: Times = False,
    quiet: Quiet = False,
) -> None:
    """Compare generated with real images by several metrics, in one pass over the images."""
    given = locals()
    with feature_options(given) as (options, world, echo):
        from fastgan._checks import InputError
        from fastgan._files import check_output, write_text
        from fastgan.data.archives import register_opener
        from fastgan.data.image_sources import ImageSource
        from fastgan.metrics.catalog import METRICS, EvaluateOptions
        from fastgan.metrics.evaluate import evaluate as measure
        from fastgan.metrics.evaluate import open_source
        from fastgan.training.evaluation import RunSamples, classify_run, is_run, open_run

        register_opener(open_run)
        sampling: dict[str, Any] = {
            "truncation": truncation,
            "seed": sample_seed,
            "standing_batches": standing_statistics,
        }
        wanted = tuple(METRICS) if metrics == "all" else tuple(part.strip() for part in metrics.split(","))
        what = EvaluateOptions(wanted, subsets, subset_size, splits, k, seed, plot, skip_unmet=metrics == "all")
        for output in filter(None, (csv, latex, html, plot)):
            check_output(output)
        if against is not None:
            from fastgan.metrics.compare import compare

            if html is not None:
                raise InputError("--html cannot be combined with --against")
            if truncation is not None or standing_statistics:
                raise InputError("--truncation and --standing-statistics cannot be combined with --against")
            compared = compare(sets, against, options, what, floor=floor, world=world)
            if world.is_first:
                for path, text in ((csv, compared.csv), (latex, compared.latex)):
                    if path is not None:
                        write_text(path, text())
                if plot is not None:
                    compared.plot(plot)
            lines = [*(compared.times() if times else []), *compared.lines()]
            echo(report(lines, compared.as_dict(), as_json=as_json))
            compared.finish()
            return
        if len(sets) > 2:
            raise InputError(f"{len(sets)} sets are compared with --against REAL; without it give one or two")
        if csv is not None or latex is not None:
            raise InputError("--csv and --latex need --against")
        a, b = sets[0], sets[1] if len(sets) > 1 else None
        images: ImageSource | Measured
        with world.agreed():
            if is_run(a):
                images = RunSamples(a, device=options.device, needs_data=b is None, **sampling)
            elif truncation is not None or standing_statistics:
                raise InputError(f"--truncation and --standing-statistics need a training run, {a} is not one")
            else:
                images = open_source(a, options)
        result = measure(images, b, options, what, floor=floor, world=world)
        with world.agreed():
            if plot is not None and world.is_first:
                result.plot(plot)
            if html is not None and world.is_first:
                from fastgan.metrics.html_report import write_report

                given_reals = b if b is not None else images.reference if isinstance(images, ImageSource) else None
                reals = None if given_reals is None else open_source(given_reals, options)
                pictures = [source if isinstance(source, ImageSource) else None for source in (images, reals)]
                write_report(result, html, fake=pictures[0], real=pictures[1])
        lines, content = [*(result.times() if times else []), *result.lines()], result.as_dict()
        if classify and world.is_first and isinstance(images, RunSamples) and images.has_classes:
            try:
                judged = classify_run(images, device=options.device, tell=warn)
                lines, content = [*judged.lines(), *lines], {**content, "classifier": judged.as_dict()}
            except InputError as error:
                warn(f"no accuracy of a classifier: {error}")
        world.gather(None)  # wait until the first has judged: processes that leave earlier close its connections
        echo(report(lines, content, as_json=as_json))
        result.finish()


@stats_app.command("save")
def stats_save(
    images: Annotated[Path, typer.Argument(parser=not_empty, help="Images: a folder, or a zip, npz, npy or pt file.")],
    output: Annotated[Path, typer.Argument(help="The .npz file to write, which pytorch-fid and clean-fid also read.")],
    root: WithRoot = False,
    save_features: Annotated[
        bool,
        typer.Option(
            "--save-features",
            help="Also write the features, so that other metrics can be computed later without a second pass.",
        ),
    ] = False,
    as_json: AsJson = False,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = None,
    device: Device = None,
    dims: Dims = None,
    backbone: BackboneName = None,
    protocol: ProtocolName = None,
    resize: Resize = None,
    precision: Precision = "auto",
    weights: Weights = None,
    skip_bad: SkipBad = False,
    checkpoint: Checkpoint = None,
    quiet: Quiet = False,
) -> None:
    """Write the feature statistics of a set of images."""
    given = locals()
    _save(images, output, given, root=root, features=save_features, as_json=as_json)


@stats_app.command("show")
def stats_show(
    file: Annotated[Path, typer.Argument(help="An .npz file of statistics.")],
    as_json: AsJson = False,
) -> None:
    """Show what a statistics file holds."""
    with user_errors():
        from fastgan.metrics import FeatureStats

        summary = _summary(FeatureStats.load(file))
    typer.echo(report([f"{key}: {value}" for key, value in summary.items()], summary, as_json=as_json))


@stats_app.command("merge")
def stats_merge(
    files: Annotated[list[Path], typer.Argument(help="Statistics files that record n, of disjoint sets of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz file to write.")],
    root: WithRoot = False,
) -> None:
    """Merge the statistics of disjoint sets of images."""
    with user_errors():
        from fastgan.metrics.evaluate import merge_files
        from fastgan.metrics.stats_file import check_statistics_path

        check_statistics_path(output)
        merged = merge_files(files)
        merged.save(output, root=root)
    typer.echo(f"{output}: N = {merged.n}, backbone {merged.backbone or 'unknown'} ({merged.dim} features)")


def _save(
    images: Path, output: Path, given: Mapping[str, Any], *, root: bool, as_json: bool, features: bool = False
) -> None:
    with feature_options(given) as (options, world, echo):
        from fastgan.metrics.evaluate import save_stats

        side = save_stats(images, output, options, world, root=root, features=features)
        result = {"file": str(output), **_summary(side.stats), "skipped": side.skipped}
        echo(report([f"{output}: {side.describe()}"], result, as_json=as_json))
        side.finish()


def _summary(stats: FeatureStats) -> dict[str, object]:
    return {
        "n": stats.n,
        "dim": stats.dim,
        "backbone": stats.backbone,
        "protocol": stats.protocol,
        "resize": stats.resize,
        "dtype": stats.dtype,
        "precision": stats.precision,
        "factor": stats.factor is not None,
        "root": stats.factor is None and stats.known_root is not None,
        "mean_norm": stats.mean.norm().item(),
        "trace": stats.cov.trace().item(),
    }
