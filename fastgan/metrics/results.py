"""Results of the metric commands, in the one shape that all of them print as JSON, and rounded for people.

The JSON of ``fastgan fid``, ``fastgan evaluate`` and ``fastgan evaluate --against`` is one object. Its keys are stable:
later versions add keys and change the meaning of none.

=====================  ======================================================================================
``metric``, ``value``  the first metric that was asked for, of the first set: name and value
``backbone``, ``dim``  the feature network and its number of features; ``backbone`` is null if unknown
``protocol``           see :mod:`fastgan.metrics.protocols`; also ``resize`` and ``precision``
``reference``          null, or the real images: ``path``, ``n``, ``skipped``, ``left_out``, ``seconds``
``sets``               one object per set, with the keys of ``reference`` and ``metrics``
``floor``              if there is one: that set's keys and ``value``, the distance of the reference to it
``bias_curve``         if drawn: ``sizes`` and ``distances``
``interval``           with ``--against``: ``level`` and ``resamples``
``not_computed``       what ``--metrics all`` left out: a reason per metric
``fastgan_version``    a string
=====================  ======================================================================================

``metrics`` maps each number's name to an object with ``value`` and, if known, ``low`` and ``high`` (the confidence
interval), ``p_next`` (of the difference from the next set) and further keys of the metric, such as KID's ``std``. The
name says what the number is: ``FID`` is Inception's alone, and ``FD (dinov2)`` another network's distance. Numbers are
not rounded; null stands for an unknown one. ``seconds`` is the time of each stage of the pass, or
null for a file of statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fastgan
from fastgan.metrics.features import Measured
from fastgan.metrics.stats import joint_precision


@dataclass(frozen=True)
class Value:
    """One number of one set; ``details`` are further ones for JSON.

    Attributes:
        value: the number.
        low, high: its confidence interval, None if there is none.
        p_next: the two-sided p-value of its difference to the next set's, None if there is none.
        spread, note: printed behind the value.
        higher_is_better: the order of sets in a table.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p_next: float | None = None
    spread: float | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    higher_is_better: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        known = {key: getattr(self, key) for key in ("low", "high", "p_next") if getattr(self, key) is not None}
        details = {key: _known_number(value) for key, value in self.details.items()}
        return {"value": self.value, **known, **details}

    def text(self, plus_minus: str = " +- ") -> str:
        """Return the value for people, rounded to two digits of half its interval or of its spread."""
        half = (self.high - self.low) / 2 if self.low is not None and self.high is not None else self.spread
        if half is None or not math.isfinite(half) or half <= 1e-6 * abs(self.value):
            return f"{self.value:.6g}"
        if half < 1e-9:
            return f"{self.value:.2g}{plus_minus}{half:.2g}"
        digits = max(0, 1 - math.floor(math.log10(half)))
        return f"{self.value:.{digits}f}{plus_minus}{half:.{digits}f}"


@dataclass(frozen=True)
class SetResult:
    """The numbers of one measured set, by name."""

    measured: Measured
    values: dict[str, Value]

    def lines(self) -> list[str]:
        """Return one line per number."""
        return [
            f"{name}:  {value.text()}" + (f" ({value.note})" if value.note else "")
            for name, value in self.values.items()
        ]


def result_dict(
    sets: Sequence[SetResult],
    reference: Measured | None,
    **others: Any,
) -> dict[str, Any]:
    """Return the object that this module describes; ``others`` that are None or empty are left out."""
    stats = [side.stats for side in (*(each.measured for each in sets), *([reference] if reference else []))]
    first = next(iter(sets[0].values), None)
    return {
        "metric": first,
        "value": None if first is None else sets[0].values[first].value,
        "backbone": _first(s.backbone for s in stats),
        "dim": stats[0].dim,
        "protocol": _first(s.protocol for s in stats),
        "resize": _first(s.resize for s in stats),
        "precision": joint_precision(s.precision for s in stats),
        "reference": None if reference is None else measured_dict(reference),
        "sets": [
            measured_dict(each.measured) | {"metrics": {name: value.as_dict() for name, value in each.values.items()}}
            for each in sets
        ],
        **{key: value for key, value in others.items() if value},
        "fastgan_version": fastgan.__version__,
    }


def measured_dict(side: Measured) -> dict[str, Any]:
    """Return the keys that every set has in JSON."""
    return {
        "path": side.label,
        "n": side.stats.n,
        "skipped": side.skipped,
        "left_out": side.left_out,
        "seconds": None if side.times is None else side.times.as_dict(),
    }


def _known_number(value: Any) -> Any:
    """Return ``value``, or None for NaN, which JSON does not have."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _first(values: Iterable[str | None]) -> str | None:
    return next((value for value in values if value), None)
