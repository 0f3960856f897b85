"""Records of a suite's run, and the JSON file that holds them (described in bench/README.md).

Files are validated when they are written and when they are read; they are written whole or not at all.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import subprocess
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from fastgan._files import write_text
from fastgan.backend import device_name

SCHEMA = 1
REQUIRED_ENVIRONMENT = ("device", "python", "torch", "revision")
MEASURED = ("median", "low", "high")


class RecordError(ValueError):
    """A file of records that does not follow the schema; the message names the file and the entry."""


@dataclass(frozen=True)
class Record:
    """One implementation on one workload.

    The first record of a workload is its reference's. Times are in seconds; ``failure`` says why there are none.

    Example:
        >>> Record("mine", "add", "torch", {"n": 10}, median=0.5, low=0.4, high=0.6, rounds=5).own
        False
    """

    suite: str
    workload: str
    implementation: str
    parameters: dict[str, Any]
    error: float | None = None
    """Relative error against the reference's result."""
    median: float | None = None
    low: float | None = None
    """The 20 % quantile."""
    high: float | None = None
    """The 80 % quantile."""
    rounds: int = 0
    first_call: float | None = None
    """Seconds of the first call in the process: compilation, allocation of workspaces, and the work itself."""
    peak_memory: int | None = None
    """Peak of torch's allocator, in bytes above its level before the call."""
    launches: int | None = None
    """Kernels and copies that one call starts on a GPU."""
    floor: float | None = None
    """Seconds below which the device cannot do this work."""
    images: int | None = None
    """Real images that one call consumes."""
    failure: str | None = None

    @property
    def own(self) -> bool:
        """True for fastgan, False for a baseline."""
        return "fastgan" in self.implementation


@dataclass(frozen=True)
class Run:
    """The records of one suite from one process.

    Example:
        >>> record = Record("mine", "add", "torch", {}, median=0.5, low=0.4, high=0.6, rounds=5)
        >>> list(Run(environment("cpu"), False, (record,)).workloads())
        ['add']
    """

    environment: dict[str, str]
    quick: bool
    records: tuple[Record, ...]

    def workloads(self) -> dict[str, list[Record]]:
        """Records by workload, the reference's first."""
        grouped: dict[str, list[Record]] = {}
        for record in self.records:
            grouped.setdefault(record.workload, []).append(record)
        return grouped


def write_run(run: Run, path: Path) -> None:
    """Write a run to ``path``.

    Raises:
        RecordError: a record does not follow the schema; nothing is written.

    Example:
        >>> from pathlib import Path
        >>> record = Record("mine", "add", "torch", {}, median=0.5, low=0.4, high=0.6, rounds=5)
        >>> write_run(Run(environment("cpu"), False, (record,)), Path("mine.json"))
    """
    content = {
        "schema": SCHEMA,
        "environment": run.environment,
        "quick": run.quick,
        "records": [asdict(r) for r in run.records],
    }
    _parse(content, str(path))
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_run(path: Path | str) -> Run:
    """Read a file that :func:`write_run` wrote.

    Raises:
        RecordError: not such a file, or of another schema.

    Example:
        >>> from pathlib import Path
        >>> record = Record("mine", "add", "torch", {}, median=0.5, low=0.4, high=0.6, rounds=5)
        >>> write_run(Run(environment("cpu"), False, (record,)), Path("mine.json"))
        >>> read_run("mine.json").records[0].median
        0.5
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: {error}") from None
    return _parse(content, str(path))


def _parse(content: Any, where: str) -> Run:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise RecordError(f"{where}: schema must be {SCHEMA}, got {found!r}")
    environment, quick, records = (content.get(key) for key in ("environment", "quick", "records"))
    if not isinstance(environment, dict) or not all(isinstance(v, str) for v in environment.values()):
        raise RecordError(f"{where}: environment must map names to text, got {environment!r}")
    missing = [key for key in REQUIRED_ENVIRONMENT if key not in environment]
    if missing:
        raise RecordError(f"{where}: environment lacks {', '.join(missing)}")
    if not isinstance(quick, bool):
        raise RecordError(f"{where}: quick must be true or false, got {quick!r}")
    if not isinstance(records, list) or not records:
        raise RecordError(f"{where}: records must be a list of at least one record")
    parsed = tuple(_parse_record(entry, f"{where}: records[{i}]") for i, entry in enumerate(records))
    names = [(r.suite, r.workload, r.implementation) for r in parsed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecordError(f"{where}: more than one record of {' / '.join(twice[0])}")
    return Run(environment, quick, parsed)


def _parse_record(entry: Any, where: str) -> Record:
    if not isinstance(entry, dict):
        raise RecordError(f"{where} must be an object, got {type(entry).__name__}")
    hints = get_type_hints(Record)
    unknown = sorted(set(entry) - set(hints))
    absent = [f.name for f in fields(Record) if f.default is MISSING and f.name not in entry]
    if unknown or absent:
        raise RecordError(f"{where}: {_list('unknown key', unknown) or _list('lacks', absent)}")
    for key, value in entry.items():
        if not _fits(value, hints[key]):
            raise RecordError(f"{where}: {key} must be {_describe(hints[key])}, got {value!r}")
    _check_measurement(record := Record(**entry), where)
    return record


def _check_measurement(record: Record, where: str) -> None:
    times = [getattr(record, name) for name in MEASURED]
    measured = [t is not None for t in times]
    if any(measured) != all(measured):
        raise RecordError(f"{where}: median, low and high go together")
    if all(measured) == (record.failure is not None):
        raise RecordError(f"{where}: a record has either times or a failure")
    if all(measured) and not 0 < record.low <= record.median <= record.high:  # type: ignore[operator]
        raise RecordError(f"{where}: 0 < low <= median <= high must hold, got {times[1]}, {times[0]}, {times[2]}")
    if all(measured) and record.rounds < 1:
        raise RecordError(f"{where}: rounds must be at least 1, got {record.rounds}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _describe(hint: Any) -> str:
    names = {float: "a finite number", int: "an integer", str: "text", type(None): "null"}
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return " or ".join(names.get(option, "an object") for option in options)


def _list(what: str, names: Sequence[str]) -> str:
    return f"{what} {', '.join(names)}" if names else ""


def environment(device: str) -> dict[str, str]:
    """Return what measurements depend on: device, driver, versions, revision of the code.

    Example:
        >>> "torch" in environment("cpu")
        True
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "scipy"):
        try:
            versions[package] = importlib.import_module(package).__version__
        except ImportError:
            versions[package] = "none"
    return {
        "device": device_name(device),
        "cuda": str(torch.version.cuda),
        "driver": _driver() if device == "cuda" else "none",
        **versions,
        "revision": _revision(),
    }


def results_folder(device: str) -> str:
    """Return the folder of bench/results for records of this machine: ``cpu``, or one named after the GPU."""
    if device != "cuda":
        return device
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _driver() -> str:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0]


def _revision() -> str:
    """Return the commit, with ``-dirty`` if files other than results have changed since.

    Without a repository, it is the value of the environment variable ``FASTGAN_REVISION``.
    """
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if commit == "unknown":
        return os.environ.get("FASTGAN_REVISION", commit)
    changed = _output(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results"]
    )
    return f"{commit}-dirty" if changed else commit


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
