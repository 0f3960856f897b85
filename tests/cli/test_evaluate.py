"""``fastgan evaluate``, resumed statistics and the floor."""

import base64
import io
import json
import re
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data.archives import ImageArray, register_opener
from fastgan.metrics import (
    FeatureStats,
    InceptionScore,
    KernelInceptionDistance,
    auth_pct,
    cmmd,
    ct_score,
    fid_infinity,
    fld,
    frechet_distance,
    inception_score,
    kernel_distance,
    mifid,
    precision_recall,
    vendi_score,
)
from fastgan.metrics.results import Value
from tests.cli.commands import assert_one_line_error, run
from tests.data.resizing import resize_array

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8), RNG.integers(80, 256, (50, 6, 6, 3), dtype=np.uint8)


class Pooled(torch.nn.Module):
    """12 features of images of any size, and class scores of them."""

    calls = 0

    def forward(self, images):
        Pooled.calls += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    """A network that costs nothing in the place of EfficientNet's."""
    from fastgan.metrics import Backbone

    def load(name, **options):
        assert name in ("inception", "efficientnet_lite0")
        return Backbone(Pooled(), name="efficientnet_lite0", dim=12, input_size=8, head=lambda features: 9 * features)

    monkeypatch.setattr("fastgan.metrics.options.load_backbone", load)
    monkeypatch.setattr("fastgan.metrics.options.local_weights", lambda: "at hand")
    monkeypatch.setenv("FASTGAN_OFFLINE", "1")
    Pooled.calls = 0


@pytest.fixture
def sets(tmp_path):
    """The fake images as a folder, the real ones as an npz."""
    (tmp_path / "fake").mkdir()
    for i, image in enumerate(FAKE):
        Image.fromarray(image).save(tmp_path / "fake" / f"{i:02}.png")
    np.savez(tmp_path / "real.npz", images=REAL)
    return tmp_path / "fake", tmp_path / "real.npz"


@pytest.fixture
def features():
    def of(images):
        pixels = torch.stack([resize_array(image, 8, "clean") for image in images])
        return Pooled()(pixels / 255)

    return of(REAL), of(FAKE)


NAMES = ("FD (efficientnet_lite0)", "FD-infinity (efficientnet_lite0)", "KD (efficientnet_lite0)")


def numbers(found):
    """The metrics of the one set in a command's JSON."""
    (one,) = found["sets"]
    return one["metrics"]


def test_several_metrics_in_one_pass(sets, features, tmp_path):
    real, fake = features
    Pooled.calls = 0
    options = ("--metrics", "fid,fid-infinity,kid,is,prdc", "--subset-size", 20, "--subsets", 5, "-k", 3, "--splits", 2)
    result = run("evaluate", *sets, *options, "--json", "--plot", tmp_path / "bias.png")
    found = json.loads(result.stdout)
    assert Pooled.calls == 90
    values = numbers(found)
    assert tuple(values)[:3] == NAMES
    distance = frechet_distance(*(FeatureStats().update(x) for x in (fake, real)))
    assert values[NAMES[0]] == {"value": pytest.approx(distance, rel=1e-5)}
    expected = kernel_distance(real, fake, subsets=5, subset_size=20)
    assert values[NAMES[2]]["value"] == pytest.approx(expected.mean, rel=1e-4)
    assert values[NAMES[2]]["std"] == pytest.approx(expected.std, rel=1e-4)
    assert values["recall"] == {"value": pytest.approx(precision_recall(real, fake, k=3).recall), "k": 3}
    assert values["class score (efficientnet_lite0)"]["value"] > 1
    assert values[NAMES[1]]["standard_error"] > 0
    assert found["bias_curve"]["sizes"] == [50]
    assert (found["metric"], found["value"]) == (NAMES[0], values[NAMES[0]]["value"])
    assert (found["precision"], found["sets"][0]["n"], found["reference"]["n"]) == ("fp32", 50, 40)
    assert Image.open(tmp_path / "bias.png").size[0] > 300

    lines = run("evaluate", *sets, *options).stdout.splitlines()
    assert (
        lines[0] == f"{sets[0]}: N = 50, backbone efficientnet_lite0 (12 features), protocol clean-fid, precision fp32"
    )
    assert lines[1].startswith(f"{sets[1]}: N = 40, ")
    assert [line.partition(":  ")[0] for line in lines[2:]] == [
        *(name for name in values if name != NAMES[0]),
        NAMES[0],  # last, as in pytorch-fid
    ]
    assert lines[-1] == f"{NAMES[0]}:  {values[NAMES[0]]['value']:.6g}"


def test_all_commands_print_one_shape(sets, tmp_path):
    """The same keys with the same meaning, and no key that names another distance."""
    options = ("--json", "--backbone", "efficientnet_lite0")
    found = [
        json.loads(run(*arguments, *options).stdout)
        for arguments in (
            ("fid", *sets),
            ("evaluate", *sets, "--metrics", "fid,prdc"),
            ("evaluate", sets[0], "--against", sets[1], "--metrics", "fid"),
        )
    ]
    for one in found[1:]:
        assert set(found[0]) <= set(one)
        for key in set(found[0]) - {"sets", "reference"}:
            assert one[key] == (pytest.approx(found[0][key]) if key == "value" else found[0][key])
        assert set(one["sets"][0]) == set(found[0]["sets"][0])
        assert one["sets"][0]["metrics"][NAMES[0]]["value"] == pytest.approx(found[0]["value"])
    assert set(found[2]) - set(found[0]) == {"interval"}

    def keys(value):
        nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return set(value if isinstance(value, dict) else ()).union(*map(keys, nested))

    assert not any(key.lower().startswith("fid") for one in found for key in keys(one))


def test_every_metric_of_all(sets, features, tmp_path):
    """All metrics that the sets allow are computed; the others are named with what they need."""
    real, fake = features
    np.savez(tmp_path / "test.npz", images=REAL[:30])
    arguments = ("evaluate", *sets, "--metrics", "all", "--splits", 2, "--floor", tmp_path / "test.npz", "--json")
    result = run(*arguments)
    found = json.loads(result.stdout)
    assert set(found["not_computed"]) == {"sfid", "intra-fid"}
    assert result.stderr.splitlines() == [
        f"fastgan: {name} is left out: it {reason}"
        for name, reason in sorted(found["not_computed"].items(), key=lambda item: item[0] == "sfid")
    ]
    assert "needs Inception" in found["not_computed"]["sfid"]
    assert "a folder per class, labels.csv or dataset.json" in found["not_computed"]["intra-fid"]
    values = {name: one["value"] for name, one in numbers(found).items()}
    expected = {
        "MiFD (efficientnet_lite0)": mifid(real, fake),
        "CMMD (efficientnet_lite0)": cmmd(real, fake),
        "AuthPct": auth_pct(real, fake),
        "C_T": ct_score(real, real[:30], fake),
        "FLD (efficientnet_lite0)": fld(real, real[:30], fake),
        "Vendi": vendi_score(fake),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_distances_within_classes(sets, features, tmp_path):
    """Classes of folders on one side and of a label file on the other; bars on the page."""
    real, fake = features
    for i, image in enumerate(FAKE):
        (tmp_path / "classes" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "classes" / str(i % 2) / f"{i:02}.png")
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(REAL):
        Image.fromarray(image).save(tmp_path / "flat" / f"{i:02}.png")
    of_fake, of_real = torch.arange(50) % 2, torch.arange(40) % 2
    expected = [
        frechet_distance(*(FeatureStats().update(x[y == c]) for x, y in ((fake, of_fake), (real, of_real))))
        for c in range(2)
    ]
    arguments = ("evaluate", tmp_path / "classes", tmp_path / "flat", "--metrics", "intra-fid", "--json")
    assert_one_line_error(run(*arguments), "--metrics intra-fid needs classes on both sides")
    rows = [[f"{i:02}.png", i % 2] for i in range(40)]
    labels = {
        "labels.csv": "".join(f"{name},{label}\n" for name, label in rows),
        "dataset.json": json.dumps({"labels": rows}),
    }
    for name, content in labels.items():
        (tmp_path / "flat" / name).write_text(content)
        found = numbers(json.loads(run(*arguments, "--html", tmp_path / "report.html").stdout))
        one = found["intra-FD (efficientnet_lite0)"]
        assert one["classes"] == pytest.approx({"0": expected[0], "1": expected[1]}, rel=1e-4)
        assert one["value"] == pytest.approx(sum(expected) / 2, rel=1e-4)
        assert (tmp_path / "report.html").read_text().count('class="bar"') == 2
        (tmp_path / "flat" / name).unlink()
    (tmp_path / "flat" / "labels.csv").write_text("".join(f"{name},{'ab'[label]}\n" for name, label in rows))
    assert_one_line_error(run(*arguments), "needs the same classes on both sides, got 0, 1 and a, b")
    (tmp_path / "flat" / "labels.csv").write_text("".join(f"{name},{int(name == '00.png')}\n" for name, _ in rows))
    computed = Pooled.calls
    assert_one_line_error(run(*arguments), "needs at least 2 images per class, ", "holds 1 of class 1")
    (tmp_path / "flat" / "labels.csv").write_text("00.png,1\n")
    assert_one_line_error(run(*arguments), "labels.csv has no label for 39 of 40 images")
    assert Pooled.calls == computed


def test_json_has_no_nan(tmp_path):
    """KID's standard error is not known for so few images."""
    for name, images in (("a", FAKE[:9]), ("b", REAL[:9])):
        np.savez(tmp_path / f"{name}.npz", images=images)
    text = run("evaluate", tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "kid", "--json").stdout
    assert "NaN" not in text
    assert numbers(json.loads(text))[NAMES[2]]["standard_error"] is None


@pytest.mark.parametrize(("reading", "forward", "bound"), [(1.0, 0.25, "decode"), (0.25, 8.0, "network")])
def test_the_stages_of_a_pass_and_their_bound(sets, monkeypatch, reading, forward, bound):
    """Use a fake clock that each image and each batch advances by a given number of seconds."""
    now = [0.0]

    def moving(method, seconds):
        def call(*arguments):
            now[0] += seconds
            return method(*arguments)

        return call

    monkeypatch.setattr("fastgan.data.stage_times.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(ImageArray, "read", moving(ImageArray.read, reading))
    monkeypatch.setattr(Pooled, "forward", moving(Pooled.forward, forward))
    arguments = ("fid", sets[1], sets[1], "--batch-size", 8, "--num-workers", 0)
    found = json.loads(run(*arguments, "--json").stdout)["reference"]["seconds"]
    expected = {"decode": 40 * reading, "waiting": 40 * reading, "resize": 0, "network": 5 * forward, "statistics": 0}
    assert found == expected | {"threads": 0, "bound": bound}
    line = run(*arguments, "--times").stdout.splitlines()[0]
    assert line.startswith(f"{sets[1]}: waiting {40 * reading:.2f} s, ")
    assert line.endswith(f"bound: {bound}")


def test_images_are_decoded_while_the_network_runs(sets, monkeypatch):
    """The first batch does not come through the network before an image of the second is read."""
    ahead, read, forward, met = threading.Event(), ImageArray.read, Pooled.forward, []

    def reading(self, index):
        if index >= 8:
            ahead.set()
        return read(self, index)

    def waiting(self, images):
        met.append(ahead.wait(60))
        return forward(self, images)

    monkeypatch.setattr(ImageArray, "read", reading)
    monkeypatch.setattr(Pooled, "forward", waiting)
    assert run("fid", sets[1], sets[1], "--batch-size", 8, "--num-workers", 1).exit_code == 0
    assert all(met)


def test_many_images_are_worth_a_compilation(sets, monkeypatch):
    compiled = []
    monkeypatch.setattr("fastgan.metrics.Backbone.compile", lambda self: compiled.append(self.name))
    for threshold, expected in ((91, 0), (90, 1)):  # 50 and 40 images
        monkeypatch.setattr("fastgan.metrics.backbones.base._COMPILE_FROM", threshold)
        run("fid", *sets)
        assert len(compiled) == expected


def test_the_floor(sets, features, tmp_path):
    with zipfile.ZipFile(tmp_path / "split.zip", "w") as file:
        for image in sets[0].iterdir():
            file.write(image, image.name)
    split = tmp_path / "split.zip"
    expected = frechet_distance(*(FeatureStats().update(x) for x in features))
    for command in ("fid", "evaluate"):
        found = json.loads(run(command, *sets, "--floor", split, "--json").stdout)
        assert found["floor"]["value"] == pytest.approx(expected, rel=1e-5)
        assert (found["floor"]["path"], found["floor"]["n"]) == (str(split), 50)
        assert "floor, the last two sets' FD (efficientnet_lite0):  " in run(command, *sets, "--floor", split).stdout


def test_a_source_that_knows_its_reference_and_a_second_split(sets, features, monkeypatch):
    real, fake = features
    monkeypatch.setattr("fastgan.data.archives._openers", [])

    def opener(path, skip_bad):
        if path != sets[0]:
            return None
        source = ImageArray(FAKE, label="a run")
        source.reference = sets[1]
        source.second_split = ImageArray(FAKE[:9], label="another split")
        return source

    register_opener(opener)
    found = json.loads(run("evaluate", sets[0], "--metrics", "fid", "--json").stdout)
    assert (found["sets"][0]["path"], found["reference"]["path"]) == ("a run", str(sets[1]))
    expected = frechet_distance(*(FeatureStats().update(x) for x in (real, fake[:9])))
    assert found["floor"]["value"] == pytest.approx(expected)
    assert (found["floor"]["path"], found["floor"]["n"]) == ("another split", 9)
    for options in (("--metrics", "kid"), (sets[1], "--metrics", "fid")):  # no distance to judge by it, or not its data
        assert "floor" not in json.loads(run("evaluate", sets[0], *options, "--json").stdout)


def test_evaluate_refuses_impossible_requests(sets, tmp_path):
    fake, real = sets
    run("stats", "save", real, tmp_path / "stats.npz")
    assert run("evaluate", fake, tmp_path / "stats.npz", "--metrics", "fid,fid-infinity").exit_code == 0
    np.savez(tmp_path / "few.npz", images=REAL[:23])
    np.savez(tmp_path / "one.npz", images=REAL[:1])
    computed = Pooled.calls
    for arguments, part in (
        (
            (fake, real, "--metrics", "fid,lpips"),
            "--metrics must be of fid, fid-infinity, kid, is, prdc, sfid, mifid, ",
        ),
        ((fake, tmp_path / "stats.npz"), "--metrics kid needs images or features, "),
        ((tmp_path / "stats.npz", real), "--metrics kid needs images or features, "),
        ((tmp_path / "stats.npz", real, "--metrics", "fid", "--plot", tmp_path / "a.png"), "--plot needs images"),
        ((fake, real, "--metrics", "ct"), "--metrics ct needs --floor with images not trained on"),
        ((fake, real, "--dims", "big"), "--dims must be 64, 192, 768, 2048 or spatial, got big"),
        ((fake,), "names no reference to compare it with"),
        ((fake, real, "--metrics", "prdc", "-k", "0"), "-k must be at least 1"),
        ((fake, real, "--plot", tmp_path / "none" / "a.png"), "its folder does not exist"),
        ((fake, real, "--plot", tmp_path / "a.xyz"), "a.xyz: its name must end in one of "),
        ((fake, tmp_path / "nothing"), "no such folder"),
        ((fake, real, "--metrics", "is", "--splits", 51), "is needs at least 51 images, "),
        ((fake, real, "-k", 45), f"prdc needs at least 46 images, {real} holds 40"),
        ((tmp_path / "few.npz", real, "--metrics", "fid-infinity"), "fid-infinity needs at least 24 images, "),
        ((fake, tmp_path / "one.npz"), "kid needs at least 2 images, "),
        ((fake, tmp_path / "one.npz", "--metrics", "fid"), "at least 2 images for a covariance, it holds 1"),
    ):
        assert_one_line_error(run("evaluate", *arguments, "--backbone", "efficientnet_lite0"), part)
    assert Pooled.calls == computed
    assert run("evaluate", fake, "--metrics", "is").stdout.splitlines()[-1].startswith("class score")


def test_all_leaves_out_metrics_with_too_few_images(sets, tmp_path):
    """Explicitly asked for, it is an error, before any feature is computed."""
    np.savez(tmp_path / "some.npz", images=REAL)  # 40, where 48 are needed for 12 features
    result = run("evaluate", tmp_path / "some.npz", sets[1], "--metrics", "all", "--plot", tmp_path / "a.png", "--json")
    assert result.exit_code == 0
    needed = f"needs at least 48 images for 12 features, {tmp_path / 'some.npz'} holds 40"
    assert f"fastgan: fid-infinity is left out: it {needed}\n" in result.stderr
    assert json.loads(result.stdout)["not_computed"]["fid-infinity"] == needed
    assert NAMES[1] not in numbers(json.loads(result.stdout))
    computed = Pooled.calls
    refused = run("evaluate", tmp_path / "some.npz", sets[1], "--metrics", "fid-infinity")
    assert_one_line_error(refused, f"--metrics fid-infinity {needed}")
    assert Pooled.calls == computed


def test_a_page_of_the_result(sets, tmp_path):
    page, plot = tmp_path / "report.html", tmp_path / "bias.png"
    options = ("--metrics", "all", "--subset-size", 20, "--splits", 2, "--html", page, "--plot", plot)
    lines = run("evaluate", *sets, *options).stdout.splitlines()
    text = page.read_text(encoding="utf-8")
    for line in lines:
        name, _, value = line.partition(":  ")
        assert f"<td>{name}</td><td>{value}</td>" in text
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', text)
    assert [name for name, _ in pictures] == ["bias curve", "generated images", "real images", "neighbors"]
    for _, content in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(content))).size) > 60
    assert "http" not in text  # self-contained
    assert_one_line_error(run("evaluate", *sets, "--html", tmp_path / "no" / "a.html"), "its folder does not exist")


def test_files_of_features_stand_for_images(sets, tmp_path):
    names = [tmp_path / name for name in ("fake.npz", "real_features.npz")]
    for images, file in zip(sets, names, strict=True):
        run("stats", "save", images, file, "--save-features")
    options = ("--metrics", "fid,kid,prdc,fid-infinity", "--subset-size", 20, "--json")
    expected = json.loads(run("evaluate", *sets, *options).stdout)
    computed = Pooled.calls
    found = json.loads(run("evaluate", *names, *options).stdout)
    assert Pooled.calls == computed
    assert len(numbers(found)) == 7
    for name, value in numbers(expected).items():
        assert numbers(found)[name] == pytest.approx(value, rel=1e-9)
    assert_one_line_error(run("evaluate", *names, "--metrics", "is"), "--metrics is needs images", "holds features")


def test_features_that_are_not_finite(sets, monkeypatch, tmp_path):
    monkeypatch.setattr(Pooled, "forward", lambda self, images: images.flatten(1)[:, :12] / 0)
    for arguments in (("fid", *sets), ("stats", "save", sets[0], tmp_path / "a.npz")):
        result = run(*arguments, "--backbone", "efficientnet_lite0")
        assert_one_line_error(result, "features must be finite: row 0")
    assert not (tmp_path / "a.npz").exists()


def test_statistics_go_on_after_an_interruption(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.metrics.features._SAVE_EVERY", 0.0)
    fake, _ = sets
    (fake / "05bad.png").write_bytes(b"")
    (fake / "25bad.png").write_bytes(b"")
    options = ("--skip-bad", "--batch-size", 4, "--num-workers", 0, "--checkpoint", tmp_path / "unfinished")
    expected = run("stats", "save", fake, tmp_path / "whole.npz", *options[:5]).stdout
    with monkeypatch.context() as patch:
        interrupt(patch, after=17)
        assert run("stats", "save", fake, tmp_path / "a.npz", *options).exit_code != 0
    assert not (tmp_path / "a.npz").exists()
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    Pooled.calls = 0
    resumed = run("stats", "save", fake, tmp_path / "a.npz", *options)
    assert Pooled.calls == 50 - 20
    assert resumed.stdout == expected.replace("whole.npz", "a.npz")
    assert "2 unreadable left out" in resumed.stdout
    whole, again = (FeatureStats.load(tmp_path / name) for name in ("whole.npz", "a.npz"))
    torch.testing.assert_close(again.cov, whole.cov, rtol=1e-12, atol=1e-15)
    assert not list((tmp_path / "unfinished").iterdir())


def test_an_evaluation_goes_on_in_its_second_set(sets, tmp_path, monkeypatch):
    """The features too, and the finished first set is not read again."""
    options = ("--metrics", "all", "--subset-size", 20, "--splits", 2, "--json")
    expected = run("evaluate", *sets, *options).stdout
    monkeypatch.setattr("fastgan.metrics.features._SAVE_EVERY", 0.0)
    options = (*options, "--batch-size", 8, "--checkpoint", tmp_path / "unfinished")
    with monkeypatch.context() as patch:
        interrupt(patch, after=50 + 16)
        assert run("evaluate", *sets, *options).exit_code != 0
    assert len(list((tmp_path / "unfinished").iterdir())) == 2
    Pooled.calls = 0
    found, expected = (json.loads(text) for text in (run("evaluate", *sets, *options).stdout, expected))
    assert set(found) == set(expected)
    for name, value in numbers(expected).items():
        assert numbers(found)[name] == pytest.approx(value, rel=1e-6)
    assert Pooled.calls == 40 - 16
    assert not list((tmp_path / "unfinished").iterdir())


def interrupt(patch, *, after):
    """Ctrl-C once the network has seen ``after`` images."""
    forward = Pooled.forward
    Pooled.calls = 0

    def interrupted(self, images):
        if Pooled.calls >= after:
            raise KeyboardInterrupt
        return forward(self, images)

    patch.setattr(Pooled, "forward", interrupted)


def test_all_leaves_out_what_the_features_do_not_allow(tmp_path):
    """A feature that is constant in the held-out images has no FLD; a metric named by itself is an error."""
    features = {"fake": FAKE, "real": REAL, "floor": REAL[:30]}
    for name, images in features.items():
        rows = images.reshape(len(images), -1)[:, :3].astype(np.float32)
        rows[:, 1] *= name != "floor"
        np.save(tmp_path / f"{name}.npy", rows)
    arguments = ("evaluate", tmp_path / "fake.npy", tmp_path / "real.npy", "--floor", tmp_path / "floor.npy")
    reason = "test must vary in every feature for an FLD, feature 1 is constant"
    for against in (arguments, (*arguments[:2], "--against", *arguments[2:])):
        found = json.loads(run(*against, "--metrics", "all", "--json").stdout)
        assert found["not_computed"]["fld"] == f"cannot be computed of these features: {reason}"
        assert found["sets"][0]["metrics"]["C_T"]["value"]
    assert_one_line_error(run(*arguments, "--metrics", "fld"), reason)


def test_an_output_that_cannot_be_written_is_found_before_the_pass(sets, tmp_path):
    (tmp_path / "folder.npz").mkdir()
    for name in ("folder.npz", "missing/a.npz"):
        path = tmp_path / name
        reason = "it is a folder" if name == "folder.npz" else "its folder does not exist"
        for arguments in (
            ("evaluate", *sets, "--html", path),
            ("evaluate", sets[0], "--against", sets[1], "--csv", path),
            ("evaluate", sets[0], "--against", sets[1], "--latex", path),
            ("stats", "save", sets[0], path),
            ("stats", "merge", tmp_path / "a.npz", "-o", path),
        ):
            assert_one_line_error(run(*arguments), f"cannot write {path}: {reason}")
    (tmp_path / "folder.png").mkdir()
    assert_one_line_error(run("evaluate", *sets, "--plot", tmp_path / "folder.png"), "it is a folder")
    assert Pooled.calls == 0


def test_statistics_are_what_the_options_ask_for(sets, tmp_path):
    """An option that contradicts two files of statistics is an error: no image is read, so it could have no effect."""
    path = tmp_path / "a.npz"
    assert run("stats", "save", sets[0], path, "--protocol", "clean-fid").exit_code == 0
    for options, message in (
        (("--protocol", "pytorch-fid"), f"protocol pytorch-fid does not fit {path}, whose protocol is clean-fid"),
        (("--resize", "legacy_pytorch"), f"protocol clean-fid+legacy_pytorch does not fit {path}"),
        (("--backbone", "dinov2"), f"--backbone dinov2 does not fit {path}, whose backbone is efficientnet_lite0"),
        (("--dims", "64"), "--dims must be 12"),
    ):
        assert_one_line_error(run("fid", path, path, *options), message)
    same = ("--protocol", "clean-fid", "--resize", "clean", "--backbone", "efficientnet_lite0")
    assert run("fid", path, path, *same).exit_code == 0
    assert_one_line_error(run("stats", "merge", path, path, "-o", tmp_path / "b.npz"), f"{path} is given twice")
    assert_one_line_error(run("stats", "merge", path, "-o", tmp_path / "b.txt"), "written to an .npz file")
    assert_one_line_error(run("stats", "show", tmp_path), f"{tmp_path} is a folder, not an npz file")


def test_features_that_cannot_be_used(tmp_path):
    good = np.random.default_rng(0).standard_normal((30, 12))
    np.save(tmp_path / "good.npy", good)
    nan = good.copy()
    nan[3, 4] = np.nan
    for name, array, message in (
        ("integers", (100 * good).astype(int), "must be floating-point features (n, dim), got torch.int64"),
        ("complex", good.astype(complex), "must be floating-point features (n, dim), got torch.complex128"),
        ("none", good[:0], "must have at least 2 feature vectors, it has 0"),
        ("one", good[:1], "must have at least 2 feature vectors, it has 1"),
        ("nan", nan, "must be finite, it has NaN or infinity"),
    ):
        path = tmp_path / f"{name}.npy"
        np.save(path, array)
        np.savez(tmp_path / "kept.npz", features=array)
        for file in (path, tmp_path / "kept.npz"):
            assert_one_line_error(run("evaluate", file, tmp_path / "good.npy", "--metrics", "all"), file, message)
    (tmp_path / "junk.npy").write_bytes(b"junk")
    assert_one_line_error(
        run("fid", tmp_path / "junk.npy", tmp_path / "good.npy"), "junk.npy is no npy file of numbers"
    )
    np.save(tmp_path / "half.npy", good.astype(np.float16))
    metrics = ("--metrics", "authpct,prdc,kid,mifid,cmmd,vendi")
    found = run("evaluate", tmp_path / "half.npy", tmp_path / "good.npy", *metrics)
    assert found.exit_code == 0, found.output


def test_seeds(sets):
    for option in ("--seed", "--sample-seed"):
        for value in (-1, 1 << 32, "x"):
            assert_one_line_error(run("evaluate", *sets, option, value), option)
    assert run("evaluate", *sets, "--metrics", "kid", "--seed", (1 << 32) - 1).exit_code == 0
    for call in (
        lambda seed: kernel_distance(torch.eye(3), torch.eye(3), seed=seed),
        lambda seed: inception_score(torch.eye(3), splits=1, seed=seed),
        lambda seed: fld(torch.eye(4), torch.eye(4), torch.eye(4), seed=seed),
        lambda seed: fid_infinity(torch.randn(30, 2), FeatureStats().update(torch.randn(9, 2)), seed=seed),
        lambda seed: KernelInceptionDistance(torch.nn.Flatten(), seed=seed),
        lambda seed: InceptionScore(torch.nn.Flatten(), seed=seed),
    ):
        for seed in (-1, 1 << 64, 0.5, True):
            with pytest.raises(ValueError, match="seed must be an integer from 0 to 4294967295, got"):
                call(seed)


def test_numbers_are_rounded_to_what_is_known():
    for value, half, text in (
        (1.2345678, 0.0123, "1.235 +- 0.012"),
        (1.2345678, None, "1.23457"),
        (1.1e-16, 4.2e-17, "1.1e-16 +- 4.2e-17"),  # zero, to rounding
        (9.4678287486575137, 1e-16, "9.46783"),
        (-0.0021, 0.0059, "-0.0021 +- 0.0059"),
    ):
        assert Value(value, spread=half).text() == text


def test_an_empty_path_is_not_the_current_folder(sets, monkeypatch):
    """That of an unset variable of the shell, where the current folder may hold images."""
    monkeypatch.chdir(sets[0])
    for arguments in (("fid", "", sets[1]), ("evaluate", sets[1], "--against", ""), ("stats", "save", "", "a.npz")):
        assert_one_line_error(run(*arguments), "must not be empty")
    assert_one_line_error(run("evaluate", *sets, "--floor", ""), "must not be empty")


def test_a_damaged_checkpoint(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.metrics.features.Measured.finish", lambda self: None)
    arguments = ("fid", *sets, "--checkpoint", tmp_path / "ck")
    expected = run(*arguments).stdout
    assert run(*arguments).stdout == expected
    for file in (tmp_path / "ck").iterdir():
        np.savez(file, mu=np.zeros(12), sigma=np.eye(12))
    assert_one_line_error(run(*arguments), "is no checkpoint of a pass, delete it to start anew")
    for file in (tmp_path / "ck").iterdir():
        file.write_bytes(b"junk")
    assert_one_line_error(run(*arguments), "is no checkpoint of a pass, delete it to start anew")
