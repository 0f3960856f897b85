"""Data sets of torchvision and Hugging Face by name."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan._checks import InputError
from fastgan.data import load_data
from fastgan.data.datasets import is_named


def digit(value, size=28):
    return Image.fromarray(np.full((size, size), value, dtype=np.uint8))


class FakeMNIST:
    classes = ("0 - zero", "1 - one")

    def __init__(self, root, train=True, transform=None, download=False):
        assert download
        self.n = 6 if train else 4

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return digit(40 * index), index % 2


class FakeSVHN(FakeMNIST):
    classes = None

    def __init__(self, root, split="train", transform=None, download=False):
        super().__init__(root, split == "train", transform, download)


def test_torchvision(monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
    monkeypatch.setattr(torchvision.datasets, "SVHN", FakeSVHN)
    split = load_data("torchvision:MNIST", 28)
    assert split.train.images.shape == (6, 1, 28, 28)
    assert split.train.images[:, 0, 3, 4].tolist() == [0, 40, 80, 120, 160, 200]
    assert split.train.labels.tolist() == [0, 1] * 3
    assert split.held_out.images.shape == (4, 1, 28, 28)
    assert split.train.class_names == ("0 - zero", "1 - one")
    assert split.found == "10 images 28x28 gray, 2 classes: 0 - zero 5, 1 - one 5"
    assert load_data("torchvision:SVHN", None).train.images.shape == (6, 1, 32, 32)
    assert load_data("torchvision:SVHN", 16, channels=3).train.class_names == ("0", "1")


@pytest.mark.parametrize("name", ["torchvision:NoSuchSet", "torchvision:ImageFolder", "torchvision:utils"])
def test_what_torchvision_has_not(name):
    with pytest.raises(InputError, match=f"{name} must name a class of torchvision.datasets with a download"):
        load_data(name, 32)


class FakeHub:
    """A split of Hugging Face's datasets: items are mappings, columns lists."""

    column_names = ("image", "label")

    def __init__(self, n):
        self.n = n
        self.features = {"label": types.SimpleNamespace(names=["cat", "dog"])}

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        if key == "label":
            return [i % 2 for i in range(self.n)]
        return {"image": Image.new("RGB", (20, 30), (key, 2, 3)), "label": key % 2}


@pytest.fixture
def hub(monkeypatch):
    sets = {"pets": {"train": FakeHub(8), "test": FakeHub(4)}, "one": {"train": FakeHub(20)}}

    def load_dataset(name):
        if name not in sets:
            raise ConnectionError(f"no {name}\nlong story")
        return sets[name]

    fake = types.ModuleType("datasets")
    fake.load_dataset, fake.load_from_disk = load_dataset, lambda folder: FakeHub(10)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_hugging_face(hub, tmp_path):
    split = load_data("huggingface:pets", 16)
    assert split.train.images.shape == (8, 3, 16, 16)
    assert split.train.images[5, :, 0, 0].tolist() == [5, 2, 3]
    assert (len(split.held_out), split.held_out.class_names) == (4, ("cat", "dog"))
    assert split.found == "12 images 20x30 RGB, 2 classes: cat 6, dog 6"
    split = load_data("huggingface:one", 16, held_out=0.2)
    assert (len(split.train), len(split.held_out)) == (16, 4)
    split = load_data(f"huggingface:{tmp_path}", 16)
    assert (len(split.train), len(split.held_out)) == (8, 2)
    with pytest.raises(InputError, match=r"huggingface:nothing cannot be loaded: no nothing$"):
        load_data("huggingface:nothing", 16)


def test_hugging_face_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="huggingface:pets needs the package datasets: pip install datasets"):
        load_data("huggingface:pets", 16)


def test_a_folder_that_the_library_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [digit(10 * i, 16) for i in range(12)], "label": [i % 2 for i in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    split = load_data(f"huggingface:{tmp_path / 'set'}", None, held_out=0.25)
    assert split.train.images.shape == (8, 1, 32, 32)
    values = torch.cat([split.train.images, split.held_out.images])[:, 0, 0, 0]
    assert sorted(values.tolist()) == [10 * i for i in range(12)]
    assert split.train.class_names == ("cat", "dog")


def test_names():
    assert is_named("torchvision:MNIST")
    assert is_named("huggingface:ylecun/mnist")
    assert not is_named("torchvision:")
    assert not is_named("torchvision")
