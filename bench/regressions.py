"""Find the workloads that one run does worse than another, beyond the noise."""

from __future__ import annotations

from fastgan.bench.records import Record, RecordError, Run

LEAST_SLOWDOWN = 1.05
"""The quantiles of a few rounds understate the noise between processes: less than this never counts."""
LEAST_SLOWDOWN_OF_ONE_ROUND = 1.2
MORE_MEMORY = 1.01

Key = tuple[str, str, str]


def regressions(old: Run, new: Run) -> list[str]:
    """Return one line per implementation that is worse in ``new``: slower, larger, more launches, or failed.

    Slower means that the 20 % quantile of the new times lies above the 80 % quantile of the old ones, and that the
    median grew by at least 5 % (20 % if either is a single run).

    Raises:
        RecordError: the runs come from different devices, or have nothing in common.
    """
    devices = old.environment["device"], new.environment["device"]
    if devices[0] != devices[1]:
        raise RecordError(f"cannot compare runs on different devices: {devices[0]} and {devices[1]}")
    before, after = _by_key(old), _by_key(new)
    common = [key for key in before if key in after]
    if not common:
        raise RecordError("the runs have no workload and implementation in common")
    return [f"{' / '.join(key)}: {worse}" for key in common for worse in _worse(before[key], after[key])]


def notes(old: Run, new: Run) -> list[str]:
    """Return one line per difference of the environments and per workload that only one of the runs holds."""
    keys = sorted(old.environment.keys() | new.environment.keys())
    values = [(key, old.environment.get(key, "?"), new.environment.get(key, "?")) for key in keys]
    lines = [f"{key}: {a} -> {b}" for key, a, b in values if a != b]
    before, after = _by_key(old), _by_key(new)
    lines += [f"only in OLD: {' / '.join(key)}" for key in before if key not in after]
    return lines + [f"only in NEW: {' / '.join(key)}" for key in after if key not in before]


def _by_key(run: Run) -> dict[Key, Record]:
    return {(r.suite, r.workload, r.implementation): r for r in run.records}


def _worse(old: Record, new: Record) -> list[str]:
    if old.median is None or old.high is None:
        return []
    if new.median is None or new.low is None:
        return [f"failed: {new.failure}"]
    found = []
    least = LEAST_SLOWDOWN_OF_ONE_ROUND if min(old.rounds, new.rounds) == 1 else LEAST_SLOWDOWN
    if new.low > old.high and new.median >= least * old.median:
        slower = f"{1e3 * old.median:.4g} ms -> {1e3 * new.median:.4g} ms, {new.median / old.median:.2f} times as long"
        found.append(f"{slower} (80 % quantile was {1e3 * old.high:.4g} ms, 20 % is {1e3 * new.low:.4g} ms)")
    if old.peak_memory and new.peak_memory and new.peak_memory > MORE_MEMORY * old.peak_memory:
        found.append(f"{old.peak_memory / 1e6:.1f} MB -> {new.peak_memory / 1e6:.1f} MB")
    if old.launches and new.launches and new.launches > old.launches:
        found.append(f"{old.launches} launches -> {new.launches}")
    return found
