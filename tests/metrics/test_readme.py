"""The tables of fastgan/metrics/README.md are true, line by line."""

import re

import pytest

from fastgan.data.resize import RESIZE_METHODS
from fastgan.metrics.catalog import METRICS, EvaluateOptions
from fastgan.metrics.protocols import PROTOCOLS, default_protocol
from tests.metrics import peers

TEXT = peers.README.read_text(encoding="utf-8")


def table(header):
    """The rows below the row that starts with ``header``, as lists of cells."""
    lines = TEXT.split(f"| {header} |", 1)[1].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def name(cell):
    return re.match(r"`([\w-]+)`", cell).group(1)


def test_protocols():
    inputs = {(127.5, 127.5): "x / 127.5 - 1", (128, 128): "(x - 128) / 128"}
    rows = table("protocol")
    assert [name(row[0]) for row in rows] == list(PROTOCOLS)
    for first, resize, pixels, floats in rows:
        protocol = PROTOCOLS[name(first)]
        assert name(resize) == protocol.resize
        assert pixels == inputs[protocol.center, protocol.scale]
        assert floats == ("truncated to 8 bits" if protocol.truncate else "kept")
        assert ("the default for Inception" in first) == (protocol.name == default_protocol("inception"))
        assert ("the default for other networks" in first) == (protocol.name == default_protocol("clip"))
    assert {name(row[0]) for row in table("resize | filter")} == set(RESIZE_METHODS)


def test_the_needs_of_each_metric_are_documented():
    rows = table("`--metrics`")
    assert [name(row[0]) for row in rows] == list(METRICS)
    for first, fake, real, further in rows:
        metric = METRICS[name(first)]
        assert (fake, real) == (metric.fake, metric.real)
        assert ("trained on" in further) == metric.trained_on
        assert ("`--floor`" in further) == bool(metric.test)
        assert ("classes on both sides" in further) == metric.classes
        assert ("more than `-k` images" in further) == (
            metric.least(EvaluateOptions(k=9)) == 10 and name(first) == "prdc"
        )


@pytest.mark.slow
def test_the_same_number(tmp_path):
    """Both sides' commands on the same folders with the same random weights."""
    assert set(peers.same_number()) == {"pytorch-fid", "clean-fid", "torch-fidelity", "torchmetrics", "prdc"}
    found = peers.differences(tmp_path)
    if not found:
        pytest.skip("none of the packages is installed")
    assert {(one.package, one.metric): one.relative for one in found if one.relative > peers.TOLERANCE} == {}
