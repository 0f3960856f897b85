"""Batches of a user's own data sets, loaders and iterables."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastgan.data import StreamLoader
from fastgan.models import DCGANDiscriminator, DCGANGenerator
from fastgan.recipes.schema import DataConfig
from fastgan.training import TrainConfig, Trainer

IMAGES = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(10) % 3


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield IMAGES[0], 1


@pytest.mark.parametrize(
    "source",
    [
        TensorDataset(IMAGES, LABELS),
        TensorDataset(IMAGES),
        DataLoader(TensorDataset(IMAGES, LABELS), 4, drop_last=True),
        [IMAGES[:4], IMAGES[4:8]],
        [{"images": IMAGES[:4], "labels": LABELS[:4]}],
        Endless(),
    ],
    ids=["dataset", "no labels", "loader", "tensors", "mappings", "endless"],
)
def test_every_kind_of_source_gives_batches_without_end(source):
    loader = StreamLoader(source, 4, seed=1)
    for _ in range(5):
        batch = loader.next()
        assert batch["images"].shape == (4, 3, 16, 16)
        assert batch["labels"].dtype == torch.int64
    assert loader.state_dict() == {"batches": 5}


def test_a_dataset_is_shuffled_by_its_seed():
    first, same, other = (StreamLoader(TensorDataset(IMAGES, LABELS), 5, seed=seed).next() for seed in (0, 0, 1))
    assert torch.equal(first["images"], same["images"])
    assert not torch.equal(first["images"], other["images"])


@pytest.mark.parametrize(
    ("source", "n_classes", "message"),
    [
        ([IMAGES * 127.5 + 127.5], 0, r"images of batch 1 of data must be in \[-1, 1\], got \[0\.\d+, 25"),
        ([IMAGES[:, 0]], 0, "images of batch 1 of data must have 4 dimensions"),
        ([IMAGES.mul(100).long()], 0, "images of batch 1 of data must have dtype"),
        ([IMAGES], 3, "batch 1 of data must have labels for a network with 3 classes"),
        ([(IMAGES, LABELS)], 2, r"labels of batch 1 of data must be in \[0, 2\), got \[0, 1, 2\]"),
        ([(IMAGES, LABELS[:4])], 3, "must be as many as the images, 10, got 4"),
        ([{"image": IMAGES}], 0, "batch 1 of data must have 'images', got 'image'"),
        ([], 0, "data must give batches again when it is gone through again, it gave none"),
    ],
)
def test_wrong_batches_are_named(source, n_classes, message):
    with pytest.raises(ValueError, match=message):
        StreamLoader(source, 4, n_classes=n_classes).next()


def test_wrong_sources_are_named():
    with pytest.raises(TypeError, match="data must be LabeledImages, a Dataset, a DataLoader or an iterable"):
        StreamLoader(3, 4)
    with pytest.raises(ValueError, match="data must have at least batch_size samples, 11"):
        StreamLoader(TensorDataset(IMAGES), 11)


@pytest.mark.parametrize("n_classes", [0, 3])
def test_the_trainer_takes_it(n_classes):
    g = DCGANGenerator(n_classes=n_classes, resolution=16, width=8)
    d = DCGANDiscriminator(n_classes=n_classes, resolution=16, width=8)
    trainer = Trainer(g, d, TensorDataset(IMAGES, LABELS), TrainConfig(steps=2, batch_size=4, clip_grad_norm=0.1))
    history = trainer.run()
    assert len(history) == 2
    trainer.load_state_dict(trainer.state_dict())
    with pytest.raises(ValueError, match="need LabeledImages"):
        Trainer(g, d, [IMAGES], TrainConfig(batch_size=4), images=DataConfig(flip=True))
