"""Evaluation of a run: its samples as a source of images for the metrics, and a classifier's judgment of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan._checks import InputError
from fastgan._files import write_bytes, write_text
from fastgan.data import DataSplit, LabeledImages, as_float, sketches_of
from fastgan.data.archives import ImageArray
from fastgan.data.image_sources import ImageSource
from fastgan.metrics._inception_score import InceptionScoreResult, inception_score
from fastgan.models import Generator
from fastgan.recipes import Recipe
from fastgan.training.classifier import Accuracies, Classifier, train_classifier
from fastgan.training.data_record import DataRecord
from fastgan.training.pictures import to_pixels
from fastgan.training.run_data import load_run_data
from fastgan.training.run_folder import CONFIG, load_generator, run_recipe
from fastgan.training.sampling import noise, sample, standing_statistics_
from fastgan.training.scoring import SEED, random_part, score_backbone

MAX_SAMPLES = 10_000
_SPLITS = 10
_STANDING = 64  # images per batch of standing statistics


class RunSamples(ImageArray):
    """Samples of a run's best generator, one per held-out image, at most 10,000.

    Each sample has the class of its held-out image, and is made from that image's sketch if the generator needs one.
    The held-out images are the reference. As many training images are the second split.

    Args:
        folder: the run.
        device: where to generate; None for the GPU if there is one.
        truncation, seed: as in :func:`fastgan.training.sample`.
        standing_batches: number of batches of 64 to recompute batch norm's statistics on before sampling; 0 keeps them.
        needs_data: raise an error if the run's data is gone or has changed. Otherwise there is no reference then, and
            the classes are those recorded in the run.

    Raises:
        InputError: the run or its data cannot be read, or an option does not fit the generator.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        truncation: float | None = None,
        seed: int = SEED,
        standing_batches: int = 0,
        needs_data: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.recipe: Recipe = run_recipe(folder)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        generator, step = load_generator(folder, device=device)
        self.n_classes = generator.n_classes
        self.data: DataSplit | None = None
        record = DataRecord.read(folder)
        try:
            self.data = load_run_data(folder, self.recipe)
        except InputError:
            if needs_data or record is None or generator.sketch_channels:
                raise
        sketches = None
        if self.data is not None:
            held_out = random_part(self.data.held_out, MAX_SAMPLES)  # in the order of the training log's
            self.labels = held_out.labels.cpu()
            sketches = sketches_of(held_out, self.recipe.data.sketches) if generator.sketch_channels else None
        else:
            assert record is not None
            counts = torch.tensor(record.held_out)
            labels = torch.arange(len(counts)).repeat_interleave(counts)
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
            self.labels = labels[order[:MAX_SAMPLES]]
        try:
            if standing_batches:
                _take_statistics(generator, self.labels, standing_batches, seed, truncation)
            images = sample(generator, self.labels, seed=seed, truncation=truncation, sketches=sketches)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.generated = images.cpu()
        label = f"{folder} (samples after {step} steps)"
        classes = self.labels if self.n_classes > 1 else None
        super().__init__(to_pixels(self.generated), label=label, labels=classes)
        self.backbone = score_backbone(self.recipe)
        if self.data is not None:
            source = self.recipe.data.source
            self.reference = _real_images(held_out, f"{source} (held out)")
            self.second_split = _real_images(random_part(self.data.train, len(held_out)), f"{source} (trained on)")

    @property
    def has_classes(self) -> bool:
        """Whether the run's data can be read and has classes."""
        return self.data is not None and self.data.train.n_classes > 1

    def name(self, index: int) -> str:
        return f"{self.folder} sample {index}"


def _take_statistics(generator: Generator, labels: Tensor, batches: int, seed: int, truncation: float | None) -> None:
    if generator.sketch_channels:
        raise InputError("standing statistics need a generator from noise, this one starts from sketches")
    device = next(generator.parameters()).device
    z = noise((batches * _STANDING, generator.dim_z), seed + 1, truncation).to(device)
    rows = labels[torch.arange(len(z)) % len(labels)].to(device)
    standing_statistics_(generator, zip(z.split(_STANDING), rows.split(_STANDING), strict=True))


def _real_images(data: LabeledImages, label: str) -> ImageArray:
    labels = data.labels.cpu() if data.n_classes > 1 else None
    return ImageArray(to_pixels(as_float(data.images)), label=label, labels=labels)


def is_run(path: Path) -> bool:
    """Return whether ``path`` is a run's folder."""
    return (path / CONFIG).is_file()


def open_run(path: Path, skip_bad: bool) -> ImageSource | None:
    """Opener for :func:`fastgan.data.archives.register_opener`: the samples of a run's folder, or None."""
    return RunSamples(path) if is_run(path) else None


@dataclass(frozen=True)
class ClassReport:
    """Judgment of a run by a classifier fine-tuned on the real images.

    Attributes:
        real: its accuracies on real images.
        generated: share of the generated images classified as the requested class; None for an unconditional generator.
        score: inception score of the generated images with this classifier.
        real_score: inception score of the held-out images.
    """

    real: Accuracies
    generated: float | None
    score: InceptionScoreResult
    real_score: InceptionScoreResult

    def lines(self) -> list[str]:
        """Summary for people."""
        real = self.real
        accuracy = "" if self.generated is None else f", generated {self.generated:.1%}"
        return [
            f"classifier accuracy: train {real.train:.1%}, validation {real.validation:.1%}, test {real.test:.1%}"
            + accuracy,
            f"IS with this classifier: real {self.real_score.mean:.3f} +- {self.real_score.std:.3f}, "
            f"generated {self.score.mean:.3f} +- {self.score.std:.3f}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self)


def classify_run(
    samples: RunSamples, *, device: torch.device | str | None = None, tell: Callable[[str], None] = print
) -> ClassReport:
    """Judge the samples with a classifier fine-tuned on the run's real images.

    The classifier is kept in the run's folder for later calls. Inception scores use ten splits, or fewer if a split
    would have less than 2 images.

    Raises:
        InputError: the run's data is gone, has one class only or too few images, or the classifier's first weights are
            not installed.
    """
    data = samples.data
    if data is None:
        raise InputError(f"{samples.folder}: a classifier needs the data of the run, which is gone or has changed")
    if data.train.n_classes < 2:
        raise InputError(f"{samples.folder}: a classifier needs data with at least 2 classes")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    classifier, accuracies = _classifier(samples, device, tell)
    logits = classifier.logits(samples.generated)
    agreement = (logits.argmax(1) == samples.labels).double().mean().item() if samples.n_classes else None
    real_logits = classifier.logits(random_part(data.held_out, MAX_SAMPLES).images)
    score, real_score = (inception_score(x, splits=max(1, min(_SPLITS, len(x) // 2))) for x in (logits, real_logits))
    return ClassReport(accuracies, agreement, score, real_score)


def _classifier(
    samples: RunSamples, device: torch.device | str, tell: Callable[[str], None]
) -> tuple[Classifier, Accuracies]:
    from safetensors.torch import load_file, save

    assert samples.data is not None
    weights, report = samples.folder / "classifier.safetensors", samples.folder / "classifier.json"
    data = samples.data
    if weights.exists() and report.exists():
        classifier = Classifier(data.train.n_classes, Classifier.size_for(data.train))
        classifier.load_state_dict(load_file(weights))
        return classifier.to(device).eval(), Accuracies(**json.loads(report.read_text(encoding="utf-8")))
    tell(f"fine-tuning a classifier on {len(data.train)} real images")
    try:
        classifier, accuracies = train_classifier(
            data.train,
            data.held_out,
            device=device,
            on_epoch=lambda epoch, accuracy: tell(f"epoch {epoch}: validation accuracy {accuracy:.1%}"),
        )
    except ValueError as error:
        raise InputError(f"{samples.folder}: no classifier of {len(data.train)} images: {error}") from error
    state = {key: value.cpu().contiguous() for key, value in classifier.state_dict().items()}
    try:
        write_bytes(weights, save(state))
        write_text(report, json.dumps(asdict(accuracies), indent=2) + "\n")
    except OSError as error:  # a run that may only be read, or a full disk
        tell(f"the classifier is not kept in {samples.folder}: {error.strerror}")
    return classifier, accuracies
