"""``python -m bench report``: tables and plots of the records, in their folders and between README.md's markers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import plots
from bench.digest import Line, highlights, lines, read_runs, times
from fastgan._files import write_text
from fastgan.bench.records import Record, RecordError, Run

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- {}: made by `python -m bench report` -->", "<!-- /{} -->"
UNITS = r"ms|µs|us|ns|s|sec|seconds?|minutes?|min|x(?!\s*\d)|×|times|images/s|img/s|[kMG]i?B|%"
LEGEND = "Medians; n× is the other's time divided by fastgan's: below 1 the other is faster."
PROSE = ("README.md", "CHANGELOG.md", "docs/*.md", "fastgan/*/README.md")
"""Documents in which a measured figure must stand in a table that is made from records."""
FIGURE = re.compile(rf"(?<![\w.])\d[\d.,]*\s?(?:{UNITS})(?![\w/])")


def write_report(root: Path = ROOT) -> list[str]:
    """Write every table and plot; return one line per problem that is left."""
    for path, text in _documents(root).items():
        write_text(path, text)
    try:
        for folder, runs in _devices(root).items():
            plots.write_plots(runs, folder)
    except ModuleNotFoundError as error:
        return [f"tables are written, plots are not drawn: {error}"]
    return check_report(root)


def check_report(root: Path = ROOT) -> list[str]:
    """Return one line per document or plot that differs from the records and per figure without a record."""
    problems = [
        f"{path.relative_to(root)} is not up to date: run `python -m bench report`"
        for path, text in _documents(root).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for folder, runs in _devices(root).items():
        problems += [
            f"{path.relative_to(root)} is not up to date: run `python -m bench report`"
            for path in plots.stale_plots(runs, folder)
        ]
    return problems + [
        f"{path.relative_to(root)}: {figure!r} stands outside the tables that are made from records"
        for pattern in PROSE
        for path in sorted(root.glob(pattern))
        for figure in unrecorded_figures(path.read_text(encoding="utf-8"))
    ]


def unrecorded_figures(text: str) -> list[str]:
    """Measured figures (a number with a unit of time, memory or speed) in Markdown outside code and made sections."""
    for name in re.findall(r"<!-- /([\w-]+) -->", text):
        text = re.sub(rf"{re.escape(BEGIN.format(name))}.*?{re.escape(END.format(name))}", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [match.group() for match in FIGURE.finditer(text)]


def _devices(root: Path) -> dict[Path, dict[str, Run]]:
    """Runs by suite for every folder of results."""
    folders = sorted({path.parent for path in (root / "bench" / "results").glob("*/*.json")})
    return {folder: read_runs(folder) for folder in folders}


def _documents(root: Path) -> dict[Path, str]:
    readme = root / "README.md"
    devices = _devices(root)
    text = readme.read_text(encoding="utf-8")
    for name, section in _sections(root, devices).items():
        text = _replace(text, name, section)
    found = {readme: text}
    scale = root / "docs" / "scale.md"
    if scale.exists():
        found[scale] = _replace(scale.read_text(encoding="utf-8"), "scale", _scale(devices), "docs/scale.md")
    for folder, runs in devices.items():
        found[folder / "README.md"] = _full_tables(runs)
    if evidence := _evidence(root):
        found[root / "bench" / "results" / "training" / "README.md"] = _training_page(evidence)
    return found


IMAGES = {"50 thousand": 50_000, "10 million": 10_000_000, "1 billion": 1_000_000_000}
"""Columns of the table of costs: numbers of images."""


def _scale(devices: dict[Path, dict[str, Run]]) -> str:
    """Tables of the record of ``python -m bench.scale``: the costs of each stage, measured and extrapolated."""
    run = next((runs["scale"] for runs in devices.values() if "scale" in runs), None)
    if run is None:
        return "**Not measured yet.**"
    stages = [record for record in run.records if not record.workload.startswith("reduce-")]
    reductions = [record for record in run.records if record.workload.startswith("reduce-")]
    costs = [
        (
            record.workload,
            _time(record.median / record.images if record.images else record.median),
            *(
                _duration(record.median * n / record.images if record.images else record.median)
                for n in IMAGES.values()
            ),
            _bytes(record.parameters["bytes"]),
        )
        for record in stages
        if record.median is not None
    ]
    shared = [
        (
            str(record.parameters["processes"]),
            _time(record.parameters["pass_seconds"]),
            _time(record.median),
            _bytes(record.parameters["bytes"]),
            f"{record.error or 0:.0e}",
        )
        for record in reductions
    ]
    first = reductions[0].parameters
    return "\n\n".join(
        [
            f"{_condition(run)}. One thread.",
            _table(("stage", "each", *(f"{name} images" for name in IMAGES), "memory"), costs),
            f"{first['images']} images of {first['features']} features, shared by gloo processes of one machine:",
            _table(("processes", "pass", "reduction", "sent by each", "difference"), shared),
        ]
    )


def _duration(seconds: float) -> str:
    """Seconds in the largest unit of which there is at least one."""
    for unit, size in (("years", 365.25 * 86400), ("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return _time(seconds)


def _bytes(count: float) -> str:
    """Bytes in kB or MB."""
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def _replace(text: str, name: str, section: str, document: str = "README.md") -> str:
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise RecordError(f"{document} must hold the markers {begin} and {end} once each, in this order")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.partition(end)[2]}"


def _sections(root: Path, devices: dict[Path, dict[str, Run]]) -> dict[str, str]:
    """README's picture and its tables: one per use, and one of what helps at which size."""
    place = {folder: folder.relative_to(root).as_posix() for folder in devices}
    folder, runs = next(((f, runs) for f, runs in devices.items() if _on_gpu(runs)), next(iter(devices.items())))
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{place[folder]}/front-dark.png">'
        f'<img src="{place[folder]}/front.png" width="900" alt="Times faster than other code; generated digits">'
        "</picture>"
    )
    everything = ", ".join(f"[{path}]({path}/README.md)" for path in place.values())
    unmeasured = "" if any(map(_on_gpu, devices.values())) else " **Not measured on a GPU yet.**"
    conditions = [sentence for found in devices.values() for sentence in _conditions(found)]
    return {
        "picture": picture,
        "layers": _highlight_table(runs, "layers"),
        "steps": _highlight_table(runs, "steps"),
        "evaluation": _highlight_table(runs, "evaluation"),
        "sizes": f"{_sizes(devices)}\n\n{' '.join(conditions)} {LEGEND} All records: {everything}.{unmeasured}",
    }


def _on_gpu(runs: dict[str, Run]) -> bool:
    return any(run.environment.get("driver", "none") != "none" for run in runs.values())


def _highlight_table(runs: dict[str, Run], use: str) -> str:
    """One row per highlight: fastgan, the fastest other and the usual one."""
    rows = []
    for highlight, line in highlights(runs):
        if highlight.use == use:
            others = [r for r in line.baselines if r is line.baselines[0] or r.implementation == highlight.against]
            times_of_others = "; ".join(_against(r, line) for r in others)
            own = f"{_time(line.own.median)} ({_short(line.own.implementation)})"
            rows.append((highlight.label, own, times_of_others, _memory(line)))
    return _table(("", "fastgan", "others", "memory"), rows)


def _against(record: Record, line: Line) -> str:
    return f"{_time(record.median)} ({record.implementation}), {times(record, line.own):.2f}×"


def _memory(line: Line) -> str:
    """Peak memory of fastgan and of the fastest other, if both are known."""
    other = line.baselines[0]
    if line.own.peak_memory is None or other.peak_memory is None:
        return ""
    return f"{_bytes(line.own.peak_memory)}; {_bytes(other.peak_memory)} ({other.implementation})"


def _sizes(devices: dict[Path, dict[str, Run]]) -> str:
    """Gains of the layers alone and of the captured step for each float32 discriminator, without and with a penalty."""
    gains: dict[str, dict[str, str]] = {}
    columns = []
    for folder, runs in devices.items():
        if "train_step" not in runs:
            continue
        plain, penalized = f"{folder.name}: layers; captured", f"{folder.name}, gradient penalty"
        columns += [plain, penalized]
        for workload, (eager, *others) in runs["train_step"].workloads().items():
            network, *options, update = workload.split(", ")
            if update != "discriminator" or "bf16" in options or eager.median is None or not others:
                continue
            gain = {r.implementation: f"{times(eager, r):.2f}×" for r in others if r.median is not None}
            layers, captured = (gain.get(f"fastgan{name}", "-") for name in (" layers, eager", ", captured"))
            size = f"{eager.parameters['width']} channels, batch {eager.parameters['batch']}"
            gains.setdefault(network, {})[penalized if options else plain] = f"{layers}; {captured} ({size})"
    return _table(("", *columns), [(network, *map(found.get, columns)) for network, found in gains.items()])


def _conditions(runs: dict[str, Run]) -> Iterator[str]:
    """A sentence for each set of suites that were measured under the same conditions."""
    groups: dict[str, list[str]] = {}
    for suite, run in runs.items():
        groups.setdefault(_condition(run), []).append(f"{suite} (quick)" if run.quick else suite)
    for condition, suites in groups.items():
        yield f"{condition}: {', '.join(suites)}."


def _condition(run: Run) -> str:
    e = run.environment
    versions = [f"{name} {e[name]}" for name in ("torch", "triton", "numpy", "scipy") if e.get(name, "none") != "none"]
    driver = [f"driver {e['driver']}"] if e.get("driver", "none") != "none" else []
    return f"{e['device']}, {', '.join([*driver, *versions])}, revision {e['revision']}"


def _cells(line: Line) -> tuple[str, ...]:
    own = [line.own] if line.own is line.fastest else [line.own, line.fastest]
    return (
        f"{line.suite}: {line.workload}",
        "; ".join(f"{_time(r.median)} ({_short(r.implementation)}){_rate(r)}" for r in own),
        "; ".join(_against(r, line) for r in line.baselines),
        "" if line.own.error is None else f"{line.own.error:.0e}",
    )


def _short(implementation: str) -> str:
    return implementation.removeprefix("fastgan").strip(" ,") or "fastgan"


def _rate(record: Record) -> str:
    return f", {record.images / record.median:.1f} images/s" if record.images and record.median else ""


def _full_tables(runs: dict[str, Run]) -> str:
    """Every record of one device."""
    head = (
        "Calls are interleaved in one process (single calls if they take seconds) and timed after all results were "
        f"checked to agree. {LEGEND} Of the square roots, `auto` and most others start from two covariances, `features "
        "kept`, `lowrank` and `singular values of features` from features, `root of one saved` from a stored factor. "
        "The times of scipy and `eigvals` depend on the spectra: `full_rank` is their worst case; real features are "
        "usually closer to `unrelated`."
    )
    columns = (
        "Median and 20 % and 80 % quantiles of interleaved calls. Times the reference: how many times as fast. Error: "
        "relative, against the reference. First call: with compilation. Memory: the most that torch's allocator held "
        "above what it held before the call."
    )
    found = [line for suite, run in runs.items() for line in lines(suite, run)]
    parts = ["# Records", "Made by `python -m bench report`.", head, *_conditions(runs)]
    parts += [_table(("", "fastgan", "others", "error"), map(_cells, found)), "## Plots"]
    parts += [f"![{path.stem}]({path.name})" for path in plots.expected_plots(runs, Path()) if "front" not in path.stem]
    parts += [columns]
    for suite, run in runs.items():
        parts += [f"## {suite}{' (quick sizes)' if run.quick else ''}", f"{_condition(run)}."]
        if "limits" in run.environment:
            parts.append(f"Floors follow from what this machine was measured to do: {run.environment['limits']}.")
        for workload, records in run.workloads().items():
            parts += [f"### {workload}", _record_table(records)]
    return "\n\n".join(parts) + "\n"


def _record_table(records: Sequence[Record]) -> str:
    reference = records[0]
    columns = {
        "median": lambda r: _time(r.median),
        "20 %": lambda r: _time(r.low),
        "80 %": lambda r: _time(r.high),
        "rounds": lambda r: str(r.rounds),
        "times the reference": lambda r: f"{times(reference, r):.2f}" if reference.median else "",
        "error": lambda r: "" if r.error is None else f"{r.error:.1e}",
        "first call": lambda r: _time(r.first_call),
        "memory": lambda r: "" if r.peak_memory is None else _bytes(r.peak_memory),
        "launches": lambda r: "" if r.launches is None else str(r.launches),
        "times the floor": lambda r: f"{r.median / r.floor:.1f}" if r.floor and r.median else "",
        "images/s": lambda r: f"{r.images / r.median:.1f}" if r.images and r.median else "",
    }
    timed = [r for r in records if r.median is not None]
    used = {name: cell for name, cell in columns.items() if any(cell(r) for r in timed)}
    rows = ((r.implementation, *(cell(r) for cell in used.values())) for r in timed)
    table = _table(("", *used), rows) if timed else ""
    failures = "\n".join(f"- {r.implementation}: {r.failure}" for r in records if r.failure)
    return "\n\n".join(part for part in (table, failures) if part)


def _evidence(root: Path) -> dict[str, dict[str, Any]]:
    """Content of each ``metrics.json`` of the training runs, by the run's name."""
    paths = sorted((root / "bench" / "results" / "training").glob("*/metrics.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _digits_table(evidence: dict[str, dict[str, Any]]) -> str:
    """Distances, accuracy and time of the runs on digits."""
    header = ("recipe", "updates", "N", "distance before", "after", "real against real", "right class", "CPU time")
    return _table(
        header, [_training_cells(name, result) for name, result in evidence.items() if "classifier" in result]
    )


def _training_page(evidence: dict[str, dict[str, Any]]) -> str:
    """All training runs: variety on digits, distances over N and steps on photographs."""
    header = ("run", "recipe", "updates", "right class", "within-class distance", "precision", "recall", "coverage")
    rows = [_variety_cells(name, result) for name, result in evidence.items() if "variety" in result]
    parts = [
        "# Training runs",
        "Made by `python -m bench.training` and `python -m bench report`. Each folder holds the last grid, the\n"
        "curves and `metrics.json`: recipe, seed, machine, its load, wall time. Distances are Frechet distances.\n"
        "Recipes are made small, as `bench/training.py` says. One seed decides no close comparison.",
        "## Digits",
        '"Right class" is how often a classifier of real digits recognizes the class that was asked for.',
        _digits_table(evidence),
        "Distances between two images of one class, divided by those of held-out digits (1 is as varied as the data),\n"
        "and neighbourhoods of pixels.",
        _table(header, rows),
    ]
    photos = {name: result for name, result in evidence.items() if "variety" not in result}
    if photos:
        parts += ["## Photographs", *(_distance_table(name, result) for name, result in photos.items())]
    return "\n\n".join(parts) + "\n"


def _variety_cells(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    agreement, near = result["classifier"].get("agreement"), result["variety"]["neighbourhoods"]
    return (
        f"[{name}]({name}/grid.png)",
        result["recipe"]["name"],
        str(result["distances"][-1]["step"]),
        "no classes" if agreement is None else f"{agreement:.1%}",
        f"{result['variety']['distance_within_class']:.2f}",
        *(f"{near[key]:.2f}" for key in ("precision", "recall", "coverage")),
    )


def _distance_table(name: str, result: dict[str, Any]) -> str:
    sizes = list(result["real_against_real"])
    named = {f"step {row['step']}": row for row in result["distances"]}
    rows = [
        (step, *("" if size not in row else f"{row[size]:.1f}" for size in sizes))
        for step, row in [*named.items(), ("training crops", result["real_against_real"])]
    ]
    seconds = result["wall_seconds"]
    about = f"[{name}]({name}/grid.png): {result['recipe']['name']}, {result['metric']}, seed {result['seed']}"
    return f"{about}, {seconds['total']:.0f} s.\n\n" + _table(("", *sizes), rows)


def _training_cells(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    size = list(result["real_against_real"])[-1]
    first, last = result["distances"][0], result["distances"][-1]
    agreement, processor = result["classifier"].get("agreement"), result["wall_seconds"].get("processor")
    return (
        f"[{name}]({name}/grid.png)",
        str(last["step"]),
        size.removeprefix("N = "),
        *(f"{value:.1f}" for value in (first[size], last[size], result["real_against_real"][size])),
        "no classes" if agreement is None else f"{agreement:.1%}",
        "" if processor is None else f"{processor:.0f} s",
    )


def _table(header: Sequence[str], rows: Any) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join((cell or '').replace('|', '/') for cell in row)} |" for row in cells)


def _time(value: float | None) -> str:
    if value is None:
        return ""
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if value * f >= 1 or u == "µs")
    return f"{float(f'{value * factor:.3g}'):g} {unit}"
