"""A classifier of real images, which judges whether generated ones show the requested class.

EfficientNet-Lite0 with its ImageNet weights and a new last layer, fine-tuned on the images that the GAN was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.data import DeviceLoader, LabeledImages, as_float, stratified_split
from fastgan.metrics.backbones.efficientnet_lite0 import DIM, INPUT_SIZE, EfficientNetLite0, load_network, normalize

MIN_INPUT_SIZE = 96  # its deepest maps are 3x3
_BATCH = 100


@dataclass(frozen=True)
class Accuracies:
    """Shares of the training, validation and test images that are classified correctly."""

    train: float
    validation: float
    test: float


class Classifier(nn.Module):
    """Class logits (n, n_classes) of images (n, 1 or 3, h, w) in [-1, 1], which are resized to ``input_size``."""

    network: EfficientNetLite0

    def __init__(self, n_classes: int, input_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.network = load_network()[0]
        self.network.fc = nn.Linear(DIM, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images + 1) * 127.5
        if pixels.shape[-1] != self.input_size:
            pixels = F.interpolate(pixels, size=(self.input_size, self.input_size), mode="bilinear", antialias=True)
        inputs = normalize(pixels).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return self.network.fc(self.network(inputs))

    @staticmethod
    def size_for(data: LabeledImages) -> int:
        """Return the size of the images, but at least 96 and at most 224, the size of ImageNet."""
        return min(INPUT_SIZE, max(MIN_INPUT_SIZE, data.images.shape[-1]))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Class logits of any number of images, batch by batch in eval mode, on the CPU."""
        device = next(self.parameters()).device
        self.eval()
        return torch.cat([self(as_float(batch).float().to(device)).cpu() for batch in images.split(_BATCH)])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of ``images`` whose most probable class is their label."""
        return (self.logits(images).argmax(1) == labels.cpu()).double().mean().item()


def train_classifier(
    train: LabeledImages,
    test: LabeledImages,
    *,
    epochs: int = 4,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[Classifier, Accuracies]:
    """Fine-tune on ``train``. A tenth of each class is left out to choose the best epoch on.

    Args:
        train: images of at least 2 classes.
        test: images that are only classified, at the end.
        epochs, batch_size: of the training with Adam, whose learning rate falls linearly from 1e-3 to zero.
        device: where to train.
        on_epoch: called with the epoch, from 1, and its validation accuracy.

    Returns:
        The classifier in eval mode, and its accuracies on the three sets.

    Raises:
        InputError: the weights of EfficientNet-Lite0 are not installed.
        ValueError: there are fewer than two classes, or too few images to hold some out.
    """
    if train.n_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {train.n_classes}")
    learnt, validation = stratified_split(train, held_out=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(train.n_classes, Classifier.size_for(train))
    classifier.to(device).to(memory_format=torch.channels_last)
    loader = DeviceLoader(learnt.to(device), min(batch_size, len(learnt)))
    steps = max(1, len(learnt) // loader.batch_size) * epochs
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best, best_state = -1.0, classifier.state_dict()
    for step in range(1, steps + 1):
        classifier.train()
        batch = loader.next()
        loss = F.cross_entropy(classifier(batch["images"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // epochs) == 0:
            accuracy = classifier.accuracy(validation.images, validation.labels)
            if accuracy > best:
                best, best_state = accuracy, {k: v.clone() for k, v in classifier.state_dict().items()}
            if on_epoch is not None:
                on_epoch(step * epochs // steps, accuracy)
    classifier.load_state_dict(best_state)
    return classifier.eval(), Accuracies(
        classifier.accuracy(learnt.images, learnt.labels), best, classifier.accuracy(test.images, test.labels)
    )
