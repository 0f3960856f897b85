"""Plots of records. Each PNG contains a digest of its records, so stale plots are noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.digest import bars, lines, seconds, times
from fastgan._files import atomic_path
from fastgan.bench.records import Record, Run

DIGEST = "fastgan-records"
SAMPLES = Path(__file__).parent / "results" / "training" / "sagan" / "grid.png"
"""Generated digits at the right of README's picture."""
SAMPLE_CELL = 68
"""Pixels from one image of the grid to the next; a border of 4 pixels is at the left and the top."""
COLOUR, GREY = "#1f6fb4", "#9aa5b1"
LABEL_HEIGHTS = (0.2, -0.2, 0.38, -0.38)
"""Vertical offsets of neighboring labels, so that they do not overlap."""


def write_plots(runs: dict[str, Run], folder: Path) -> None:
    """Draw every plot that the runs of one device have records for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    for name, draw in _drawable(runs).items():
        figure = Figure(layout="constrained", dpi=110)
        draw(figure, runs)
        with atomic_path(folder / f"{name}.png") as path:
            figure.savefig(path, metadata={DIGEST: _digest(name, runs)})


def expected_plots(runs: dict[str, Run], folder: Path) -> list[Path]:
    """The plots that the runs allow."""
    return [folder / f"{name}.png" for name in _drawable(runs)]


def stale_plots(runs: dict[str, Run], folder: Path) -> list[Path]:
    """Plots that are missing, stale, or no longer needed."""
    from PIL import Image

    expected = expected_plots(runs, folder)
    stale = [path for path in folder.glob("*.png") if path not in expected]
    for path in expected:
        if not path.exists():
            stale.append(path)
            continue
        with Image.open(path) as image:
            if image.info.get(DIGEST) != _digest(path.stem, runs):
                stale.append(path)
    return stale


def _digest(name: str, runs: dict[str, Run]) -> str:
    content = json.dumps({suite: asdict(run) for suite, run in runs.items()}, sort_keys=True).encode()
    samples = SAMPLES.read_bytes() if name.startswith("front") and SAMPLES.exists() else b""
    return hashlib.sha256(content + samples).hexdigest()[:16]


def _drawable(runs: dict[str, Run]) -> dict[str, Callable[[Any, dict[str, Run]], None]]:
    attention = [r for r in _timed(runs, "attention") if r.workload.startswith("core")]
    plots: dict[str, Callable[[Any, dict[str, Run]], None]] = {}
    if any(lines(suite, run) for suite, run in runs.items()):
        plots["speedup"] = _speedup
    if bars(runs):
        plots["front"] = _front
        plots["front-dark"] = lambda figure, runs: _front(figure, runs, dark=True)
    if attention:
        plots["attention-time"] = lambda figure, _: _against_n(figure, attention, "median", "ms", 1e3)
    if any(r.peak_memory for r in attention):
        remembered = [r for r in attention if r.peak_memory]
        plots["attention-memory"] = lambda figure, _: _against_n(figure, remembered, "peak_memory", "MB", 1e-6)
    if any(r.error for r in _timed(runs, "sqrtm")):
        plots["sqrtm-error"] = _sqrtm_error
    if any(r.images for suite in runs for r in _timed(runs, suite)):
        plots["images"] = _images
    return plots


def _timed(runs: dict[str, Run], suite: str) -> list[Record]:
    return [r for r in runs[suite].records if r.median is not None] if suite in runs else []


def _speedup(figure: Any, runs: dict[str, Run]) -> None:
    """Baselines' times over fastgan's, for the workloads of the summary."""
    found = [line for suite, run in runs.items() for line in lines(suite, run)][::-1]
    figure.set_size_inches(10, 1.2 + 0.55 * len(found))
    axes = figure.subplots()
    axes.axvline(1, color=COLOUR, zorder=1)
    for row, line in enumerate(found):
        axes.axhline(row, color="#e5e9ed", zorder=0)
        for r, height in zip(line.baselines, cycle(LABEL_HEIGHTS), strict=False):
            x = times(r, line.own)
            axes.scatter(x, row, color=GREY, zorder=2)
            axes.annotate(r.implementation, (x, row + height), fontsize=6.5, va="center", zorder=3)
    ratios = [times(r, line.own) for line in found for r in line.baselines]
    axes.set(xscale="log", xlim=(min(*ratios, 1) / 1.5, max(*ratios, 2) * 3), ylim=(-0.5, len(found)))
    axes.set_yticks(range(len(found)), [f"{line.suite}: {line.workload}" for line in found], fontsize=8)
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("median time over fastgan's: right of the line fastgan is faster")
    axes.set_title(_machines(runs), fontsize=9)


def _machines(runs: dict[str, Run]) -> str:
    """Name the device of the suites that are drawn; if there are several, all but the first with their suites."""
    suites: dict[str, list[str]] = {}
    for suite, run in runs.items():
        if suite != "scale":
            suites.setdefault(run.environment["device"], []).append(suite)
    first, *others = suites
    return "; ".join([first, *(f"{', '.join(suites[device])} on {device}" for device in others)])


def _front(figure: Any, runs: dict[str, Run], dark: bool = False) -> None:
    """README's picture, 900 pixels wide: how many times faster at the left, generated images at the right."""
    from matplotlib.image import imread

    background, text, faint, color = (
        ("#0d1117", "#f0f6fc", "#9198a1", "#58a6ff") if dark else ("#ffffff", "#1f2328", "#59636e", COLOUR)
    )
    found = bars(runs)
    figure.set_layout_engine("none")
    figure.set_size_inches(900 / figure.dpi, (70 + 56 * len(found)) / figure.dpi)
    figure.set_facecolor(background)
    heading: dict[str, Any] = {"fontsize": 14, "weight": "bold", "color": text, "va": "top"}
    left = 0.66 if SAMPLES.exists() else 0.95

    axes = figure.add_axes((0.015, 0.08, left, 0.83))
    longest = max(ratio for _, _, ratio in found)
    for row, (label, other, ratio) in enumerate(reversed(found)):
        axes.barh(row - 0.17, ratio, height=0.36, color=color)
        axes.text(0, row + 0.07, label[0].upper() + label[1:], fontsize=12, color=text, va="bottom")
        figures = f"{ratio:.1f}×"
        for words, skip, style in (
            (figures, 6, {"weight": "bold", "color": text}),
            (other, 14 + 9 * len(figures), {"color": faint}),
        ):
            axes.annotate(
                words, (ratio, row - 0.18), (skip, 0), textcoords="offset points", va="center", fontsize=12, **style
            )
    axes.set(xlim=(0, 1.85 * longest), ylim=(-0.5, len(found) - 0.4))
    axes.axis("off")
    figure.text(0.015, 0.985, "Times faster than", **heading)
    figure.text(0.015, 0.02, f"Medians on {_machines(runs)}", fontsize=10, color=faint, va="bottom")

    if SAMPLES.exists():
        images = imread(SAMPLES)[: 4 + 5 * SAMPLE_CELL, : 4 + 4 * SAMPLE_CELL]  # 5 rows of 4
        grid = figure.add_axes((0.68, 0.08, 0.305, 0.83))
        grid.imshow(images, interpolation="nearest")
        grid.axis("off")
        figure.text(0.8325, 0.985, "Generated digits", ha="center", **heading)


def _against_n(figure: Any, records: Iterable[Record], field: str, unit: str, factor: float) -> None:
    """One panel per pass: ``field`` of the attention core against its number of queries."""
    records = list(records)
    modes = list(dict.fromkeys(r.parameters["mode"] for r in records))
    figure.set_size_inches(4 * len(modes), 3.6)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        chosen = [r for r in records if r.parameters["mode"] == mode]
        for dtype in dict.fromkeys(r.parameters["dtype"] for r in chosen):
            for name in dict.fromkeys(r.implementation for r in chosen):
                _curve(
                    axes,
                    [r for r in chosen if (r.implementation, r.parameters["dtype"]) == (name, dtype)],
                    field,
                    factor,
                )
        values = [factor * getattr(r, field) for r in chosen]
        axes.set(title=mode, xlabel="queries N (keys: N / 4)", ylabel=unit, xscale="log", yscale="log")
        axes.set(ylim=(min(values) / 2, max(values) * 2))
        axes.set_xticks(sorted({r.parameters["height"] ** 2 for r in chosen}), minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        _plain_ticks(axes.yaxis)
        axes.legend(fontsize=7)


def _curve(axes: Any, records: list[Record], field: str, factor: float) -> None:
    """The widest heads at each N."""
    widest: dict[int, Record] = {}
    for r in sorted(records, key=lambda r: r.parameters["channels"]):
        widest[r.parameters["height"] ** 2] = r
    if not widest:
        return
    values = [factor * getattr(widest[n], field) for n in sorted(widest)]
    first = records[0]
    label = f"{first.implementation}, {first.parameters['dtype']}"
    axes.plot(
        sorted(widest),
        values,
        marker="o",
        markersize=4,
        label=label,
        zorder=3 if first.implementation == "fastgan" else 2,
    )


def _sqrtm_error(figure: Any, runs: dict[str, Run]) -> None:
    """Error against time, one panel per full-rank workload."""
    workloads = {
        name: [r for r in records if r.median is not None and r.error is not None]
        for name, records in runs["sqrtm"].workloads().items()
        if "full_rank" in name
    }
    figure.set_size_inches(5 * len(workloads), 6)
    for axes, (name, records) in zip(
        figure.subplots(1, len(workloads), squeeze=False)[0], workloads.items(), strict=True
    ):
        for i, r in enumerate(records):
            place = (1e3 * seconds(r), max(r.error or 0.0, 1e-17))
            axes.scatter(*place, color=f"C{i % 10}", marker="o" if r.own else "X", s=45, label=r.implementation)
        axes.set(title=name, xlabel="ms", ylabel="relative error", xscale="log", yscale="log")
        axes.margins(0.1)
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        _plain_ticks(axes.xaxis)


def _images(figure: Any, runs: dict[str, Run]) -> None:
    """Real images per second."""
    found = [(suite, r) for suite in runs for r in _timed(runs, suite) if r.images][::-1]
    figure.set_size_inches(9, 1.0 + 0.25 * len(found))
    axes = figure.subplots()
    rates = [(r.images or 0) / seconds(r) for _, r in found]
    colors = [COLOUR if r.own else GREY for _, r in found]
    bars = axes.barh(range(len(found)), rates, color=colors)
    axes.set_yticks(range(len(found)), [f"{suite}: {r.workload}: {r.implementation}" for suite, r in found], fontsize=7)
    axes.bar_label(bars, [f" {float(f'{rate:.3g}'):g}" for rate in rates], fontsize=7)
    axes.set(xscale="log", xlim=(min(rates) / 2, max(rates) * 2), xlabel="images per second")
    _plain_ticks(axes.xaxis)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
