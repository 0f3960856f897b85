"""Many sets against one reference: the values, their intervals, and which differences are noise."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.metrics import FeatureStats, frechet_distance, kernel_distance, precision_recall
from fastgan.metrics._fid_infinity import distance_influences
from fastgan.metrics.compare import METRICS, compare
from fastgan.metrics.options import FeatureOptions
from tests.cli.commands import assert_one_line_error

DIM = 6


def rows(n, shift=0.0, seed=0):
    return np.random.default_rng(seed).standard_normal((n, DIM)) + shift


@pytest.fixture
def sets(tmp_path):
    """Files of features: a reference, and sets further and further away; the two nearest are samples of one kind."""
    made = {"real": rows(400), "far": rows(300, 1.0, 1), "near": rows(300, 0.1, 2), "same": rows(300, 0.1, 3)}
    for name, features in made.items():
        np.save(tmp_path / f"{name}.npy", features)
    return tmp_path, made


def test_values_are_those_of_the_functions(sets):
    folder, made = sets
    found = compare(
        [folder / "far.npy", folder / "near.npy"],
        folder / "real.npy",
        FeatureOptions(),
        metrics=METRICS,
        subsets=3,
        subset_size=100,
        k=3,
    )
    assert [row.label for row in found.rows] == [str(folder / "near.npy"), str(folder / "far.npy")]
    assert found.order == [str(folder / "far.npy"), str(folder / "near.npy")]
    for row in found.rows:
        fake, real = made[row.label.split("/")[-1][:-4]], made["real"]
        stats = [FeatureStats().update(x) for x in (fake, real)]
        assert row.values["fid"].value == pytest.approx(frechet_distance(*stats), rel=1e-9)
        expected = kernel_distance(real, fake, subsets=3, subset_size=100).mean
        assert row.values["kid"].value == pytest.approx(expected, rel=1e-9)
        near = precision_recall(real, fake, k=3)
        for name in ("precision", "recall", "density", "coverage"):
            assert row.values[name].value == pytest.approx(getattr(near, name))
        for value in row.values.values():
            assert value.low <= value.value <= value.high


def test_influences_are_the_derivative_of_the_distance():
    """Adding a vector once more moves the distance by its influence over n, to first order."""
    features = torch.from_numpy(rows(200, 0.5, 4))
    reference, stats = FeatureStats().update(rows(300)), FeatureStats().update(features)
    influences = distance_influences(features, stats, reference)
    weight = 1e-4
    for i in (0, 17):
        mean = (1 - weight) * stats.mean + weight * features[i]
        shift = features[i] - stats.mean
        population = stats.cov * (199 / 200)
        moved = (1 - weight) * population + weight * (1 - weight) * torch.outer(shift, shift)
        before = frechet_distance((stats.mean, population), reference)
        change = (frechet_distance((mean, moved), reference) - before) / weight
        assert change == pytest.approx(influences[i].item(), rel=0.03, abs=0.02)


def test_intervals_cover_and_tests_tell_noise_from_difference(sets):
    """Of sets drawn again and again: intervals scatter as the distances do, equal sets seldom differ."""
    folder, _ = sets
    widths, distances, p_equal = [], [], []
    for seed in range(12):
        for name in ("x", "y"):
            np.save(folder / f"{name}.npy", rows(300, 0.5, 100 + 2 * seed + (name == "y")))
        found = compare([folder / "x.npy", folder / "y.npy"], folder / "real.npy", FeatureOptions(), seed=seed)
        for row in found.rows:
            widths.append(row.values["fid"].high - row.values["fid"].low)
            distances.append(row.values["fid"].value)
        p_equal.append(found.rows[0].values["fid"].p_next)
    assert 0.6 < np.mean(widths) / (2 * 1.96 * np.std(distances)) < 1.6
    assert np.mean(np.array(p_equal) < 0.05) < 0.35
    far = compare([folder / "x.npy", folder / "far.npy"], folder / "real.npy", FeatureOptions())
    assert far.rows[0].values["fid"].p_next < 0.01
    assert far.rows[1].values["fid"].p_next is None


def test_the_command(sets, tmp_path):
    folder, _ = sets
    names = [folder / f"{name}.npy" for name in ("far", "near", "same")]
    outputs = ["--csv", tmp_path / "a.csv", "--latex", tmp_path / "a.tex", "--plot", tmp_path / "a.png"]
    arguments = ["evaluate", *names, "--against", folder / "real.npy", "--metrics", "fid,prdc", *outputs]
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["path"] for row in found["sets"]][-1] == str(names[0])
    assert set(found["sets"][0]["values"]) == {"FD (unknown backbone)", "precision", "recall", "density", "coverage"}
    table = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert len(table) == 3 * 5
    best = found["sets"][0]
    assert float(table[0]["value"]) == best["values"]["FD (unknown backbone)"]["value"]
    assert (tmp_path / "a.tex").read_text().count(r"\\") == 4
    assert (tmp_path / "a.png").stat().st_size > 1000
    lines = CliRunner().invoke(app, [str(argument) for argument in arguments]).stdout.splitlines()
    assert len(lines) == 5
    assert lines[2].startswith(best["path"])


def test_statistics_alone_have_no_interval(sets, tmp_path):
    folder, made = sets
    FeatureStats().update(made["far"]).save(tmp_path / "far.npz")
    (row,) = compare([tmp_path / "far.npz"], folder / "real.npy", FeatureOptions()).rows
    assert (row.values["fid"].low, row.n) == (None, 300)


def test_what_is_refused(sets, tmp_path):
    folder, made = sets
    FeatureStats().update(made["far"]).save(tmp_path / "far.npz")
    real = folder / "real.npy"
    for arguments, part in (
        ((real, real, real), "3 sets are compared with --against"),
        ((real, real, "--csv", "a.csv"), "--csv and --latex go with --against"),
        ((tmp_path / "far.npz", "--against", real, "--metrics", "kid"), "needs images or features"),
        ((real, "--against", real, "--metrics", "is"), "--metrics must be of fid, kid, prdc with --against"),
        ((real, "--against", real, "--csv", tmp_path / "none" / "a.csv"), "its folder does not exist"),
        ((real, "--against", tmp_path / "nothing"), "no such folder"),
    ):
        assert_one_line_error(CliRunner().invoke(app, ["evaluate", *map(str, arguments)]), part)
