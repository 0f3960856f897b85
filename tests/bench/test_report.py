"""README's tables and the plots follow from the committed records; a figure without a record is found."""

import dataclasses
import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.digest import HIGHLIGHTS, bars, highlights, read_runs
from bench.report import ROOT, check_report, unrecorded_figures, write_report
from fastgan.bench.records import Record, RecordError, Run, environment, read_run, write_run

SECTIONS = ("picture", "layers", "steps", "evaluation", "sizes")


def times(median):
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "rounds": 5}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A README and one record of every kind that a table or a plot shows, with its report."""
    tmp_path = tmp_path_factory.mktemp("repository")
    sections = "".join(f"<!-- {n}: made by `python -m bench report` -->\n<!-- /{n} -->\n" for n in SECTIONS)
    (tmp_path / "README.md").write_text(f"# Title\n{sections}")
    parameters = {"mode": "penalty", "dtype": "float32", "channels": 64, "height": 64}
    attention = [
        Record("attention", f"{kind} penalty, C=64 H=64 B=4", name, parameters, peak_memory=10_000_000, **times(t))
        for kind in ("core", "block")
        for name, t in (("eager", 0.02), ("fastgan", 0.005), ("compile", 0.01))
    ]
    roots = [
        Record("sqrtm", "full_rank", name, {}, error=e, images=7, **times(t))
        for name, t, e in (("scipy", 0.2, None), ("fastgan auto", 0.1, 1e-15), ("fastgan, saved", 0.05, 0.0))
    ]
    size = {"width": 16, "batch": 8}
    updates = [
        Record("train_step", f"{network}, discriminator", name, size, **times(t))
        for network, captured in (("gan 32x32", 0.01), ("gan 32x32, gradient penalty", 0.08), ("gan 32x32, bf16", 1.0))
        for name, t in (
            ("torch layers, eager", 0.02),
            ("fastgan layers, eager", 0.016),
            ("fastgan, captured", captured),
        )
    ]
    folder = tmp_path / "bench" / "results" / "cpu"
    for suite, records in (("attention", attention), ("sqrtm", roots), ("train_step", updates)):
        write_run(Run(environment("cpu"), True, tuple(records)), folder / f"{suite}-quick.json")
    assert write_report(tmp_path) == []
    return tmp_path


def test_the_page_of_training_runs(repository):
    folder = repository / "bench" / "results" / "training"
    shared = {"seed": 3, "metric": "frechet_efficientnet_lite0", "wall_seconds": {"total": 61.2, "processor": 50.0}}
    digits = {
        **shared,
        "recipe": {"name": "acgan-digits"},
        "real_against_real": {"N = 128": 8.0, "N = 512": 2.7},
        "distances": [{"step": 0, "N = 128": 210.0, "N = 512": 208.0}, {"step": 9, "N = 128": 20.0, "N = 512": 18.0}],
        "classifier": {"agreement": 0.985},
        "variety": {
            "distance_within_class": 0.876,
            "neighbourhoods": {"precision": 0.5, "recall": 0.25, "density": 1.0, "coverage": 0.75},
        },
    }
    photos = {
        **shared,
        "recipe": {"name": "dcgan"},
        "real_against_real": {"N = 128": 9.0, "N = 10000": 1.5},
        "distances": [{"step": 0, "N = 128": 300.0}, {"step": 50, "N = 128": 70.0, "N = 10000": 61.0}],
    }
    for name, result in (("acgan", digits), ("photos-dcgan", photos)):
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.json").write_text(json.dumps(result))
    assert "bench/results/training/README.md is not up to date" in " ".join(check_report(repository))
    assert write_report(repository) == []
    page = (folder / "README.md").read_text()
    assert "| [acgan](acgan/grid.png) | acgan-digits | 9 | 98.5% | 0.88 | 0.50 | 0.25 | 0.75 |" in page
    assert "[photos-dcgan](photos-dcgan/grid.png): dcgan, frechet_efficientnet_lite0, seed 3, 61 s." in page
    assert "|  | N = 128 | N = 10000 |" in page
    assert "| step 0 | 300.0 |  |\n| step 50 | 70.0 | 61.0 |\n| training crops | 9.0 | 1.5 |" in page
    assert "| [acgan](acgan/grid.png) | 9 | 512 | 208.0 | 18.0 | 2.7 | 98.5% | 50 s |" in page


@pytest.fixture
def repository(reported, tmp_path):
    """A copy to change."""
    return shutil.copytree(reported, tmp_path / "repository")


def test_committed_documents_and_plots_are_up_to_date():
    assert check_report() == []


def test_tables_and_plots_from_records(repository):
    readme = (repository / "README.md").read_text()
    usual = "20 ms (eager), 4.00×"
    row = f"| gradient penalty through attention, 64x64 | 5 ms (fastgan) | 10 ms (compile), 2.00×; {usual} |"
    assert f"{row} 10 MB; 10 MB (compile) |" in readme
    assert "|  | cpu: layers; captured | cpu, gradient penalty |" in readme
    size = "(16 channels, batch 8)"
    assert f"| gan 32x32 | 1.25×; 2.00× {size} | 1.25×; 0.25× {size} |" in readme
    assert "**Not measured on a GPU yet.**" in readme
    folder = repository / "bench" / "results" / "cpu"
    summary = (folder / "README.md").read_text()
    assert (
        f"| attention: block penalty, C=64 H=64 B=4 | 5 ms (fastgan) | 10 ms (compile), 2.00×; {usual} |  |" in summary
    )
    assert "| sqrtm: full_rank | 100 ms (auto), 70.0 images/s; 50 ms (saved), 140.0 images/s | 200 ms" in summary
    plots = {path.stem for path in folder.glob("*.png")}
    names = {"speedup", "attention-time", "attention-memory", "sqrtm-error", "images"}
    assert plots == names | {"front", "front-dark"}
    assert check_report(repository) == []


def test_the_pictures_are_900_pixels_wide_and_differ(repository):
    from PIL import Image

    folder = repository / "bench" / "results" / "cpu"
    light, dark = (Image.open(folder / f"{name}.png").convert("L") for name in ("front", "front-dark"))
    assert light.width == dark.width == 900
    assert light.getpixel((0, 0)) > 250
    assert dark.getpixel((0, 0)) < 20


def test_the_bars_compare_with_the_usual_code(repository):
    runs = read_runs(repository / "bench" / "results" / "cpu")
    assert bars(runs) == [("gradient penalty through attention, 64x64", "eager PyTorch", pytest.approx(4.0))]


def test_every_highlight_has_a_record():
    runs = read_runs(ROOT / "bench" / "results" / "cpu")
    assert [highlight for highlight, _ in highlights(runs)] == list(HIGHLIGHTS)
    assert len(bars(runs)) == 6


def test_a_gpus_records_take_the_place_of_the_remark(repository):
    folder = repository / "bench" / "results"
    for suite in ("attention", "train_step"):
        run = read_run(folder / "cpu" / f"{suite}-quick.json")
        environment = run.environment | {"device": "GPU X", "driver": "1.2"}
        write_run(dataclasses.replace(run, environment=environment, quick=False), folder / "gpu-x" / f"{suite}.json")
    assert write_report(repository) == []
    readme = (repository / "README.md").read_text()
    assert "GPU X, driver 1.2" in readme
    assert "Not measured" not in readme
    assert "bench/results/gpu-x/front.png" in readme
    assert "gpu-x: layers; captured" in readme


def test_a_full_run_replaces_a_quick_one(repository):
    folder = repository / "bench" / "results" / "cpu"
    quick = read_run(folder / "sqrtm-quick.json")
    full = dataclasses.replace(
        quick, quick=False, records=tuple(dataclasses.replace(r, **times(3.0)) for r in quick.records)
    )
    write_run(full, folder / "sqrtm.json")
    write_report(repository)
    assert "3 s (auto)" in (folder / "README.md").read_text()


def change_a_figure(root):
    path = root / "README.md"
    path.write_text(path.read_text().replace("5 ms (fastgan)", "4 ms (fastgan)"))


def change_a_record(root):
    path = root / "bench" / "results" / "cpu" / "attention-quick.json"
    content = json.loads(path.read_text())
    content["records"][0] |= times(0.03)
    path.write_text(json.dumps(content))


def lose_a_plot(root):
    (root / "bench" / "results" / "cpu" / "speedup.png").unlink()


def keep_an_old_plot(root):
    folder = root / "bench" / "results" / "cpu"
    shutil.copy(folder / "speedup.png", folder / "old.png")


def add_a_row_without_a_record(root):
    with (root / "README.md").open("a") as file:
        file.write("| attention on another device | 0.3 ms |\n")


def claim_a_speed_elsewhere(root):
    (root / "docs").mkdir()
    (root / "docs" / "layers.md").write_text("All layers are 3 times as fast.\n")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_a_figure, "README.md is not up to date"),
        (change_a_record, "README.md is not up to date"),
        (change_a_record, "speedup.png is not up to date"),
        (change_a_record, "front-dark.png is not up to date"),
        (lose_a_plot, "speedup.png is not up to date"),
        (keep_an_old_plot, "old.png is not up to date"),
        (add_a_row_without_a_record, "README.md: '0.3 ms' stands outside"),
        (claim_a_speed_elsewhere, "docs/layers.md: '3 times' stands outside"),
    ],
)
def test_disagreements_are_found(repository, change, problem):
    change(repository)
    assert any(problem in line for line in check_report(repository))


@pytest.mark.parametrize(
    "text", ["12 ms", "3.5× faster", "| 0.3 s |", "1,000 images/s", "2.5 GB", "twice: 2x", "12 % less"]
)
def test_measured_figures_are_recognized(text):
    assert unrecorded_figures(f"a {text} b")


@pytest.mark.parametrize(
    "text", ["torch 2.11", "32 x 32", "sm_80", "N = 512", "```\n3 ms\n```", "d <= 64", "a 2x2 pool"]
)
def test_other_numbers_are_not_figures(text):
    assert unrecorded_figures(text) == []


def test_a_readme_without_markers_is_refused(repository):
    (repository / "README.md").write_text("# Title\n")
    with pytest.raises(RecordError, match="README.md must hold the markers"):
        check_report(repository)


def test_without_matplotlib_the_tables_are_written(repository, monkeypatch):
    change_a_record(repository)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (problem,) = write_report(repository)
    assert problem.startswith("tables are written, plots are not drawn: ")
    assert "| eager | 30 ms |" in (repository / "bench" / "results" / "cpu" / "README.md").read_text()


def test_check_on_the_command_line():
    assert CliRunner().invoke(app, ["report", "--check"]).exit_code == 0
