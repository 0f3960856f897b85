"""Data sets by name and from folders, and what is wrong with a folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan._checks import InputError
from fastgan.data import image_folder, load_data, sketch_folder


def write(path, color, size=(10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_class_folders(tmp_path):
    for i in range(4):
        write(tmp_path / "cat" / f"{i}.png", (255, 0, 0))
        write(tmp_path / "apple" / "more" / f"{i}.png", (0, 0, 255))
    data = image_folder(tmp_path, 16)
    assert data.class_names == ("apple", "cat")
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (8, 3, 16, 16)
    assert data.images[data.labels == 0].float().mean((0, 2, 3)).tolist() == [0, 0, 255]
    assert image_folder(tmp_path, 16, channels=1).images.shape == (8, 1, 16, 16)


def test_a_heap_is_one_class_and_is_cropped_to_its_centre(tmp_path):
    wide = Image.new("RGB", (32, 16), (0, 255, 0))
    wide.paste((255, 255, 255), (8, 0, 24, 16))
    wide.save(tmp_path / "a.png")
    data = image_folder(tmp_path, 16)
    assert (data.n_classes, data.labels.tolist()) == (1, [0])
    assert data.images.min() == 255


def sketch_tree(root, names=("a/1", "a/2", "b/1", "b/2")):
    for name in names:
        write(root / "images" / f"{name}.png", (9, 9, 9))
        write(root / "sketches" / f"{name}.bmp", (int(name[-1]) * 50,) * 3)
    return root


def test_sketch_folders(tmp_path):
    data = sketch_folder(sketch_tree(tmp_path), 16, paired=True)
    assert data.paired
    assert data.sketches[:, 0, 0, 0].tolist() == [50, 100, 50, 100]
    write(tmp_path / "sketches" / "a" / "3.png", (7, 7, 7))
    data = sketch_folder(tmp_path, 16, paired=False)
    assert data.sketch_labels.tolist() == [0, 0, 0, 1, 1]
    split = load_data(tmp_path, 16, sketches="unpaired", held_out=0.5)
    assert (len(split.train), len(split.held_out), len(split.held_out.sketches)) == (2, 2, 5)
    assert len(load_data(tmp_path, 16, held_out=0.5).train) == 2  # its images alone


def test_a_sketch_without_its_partner_is_named(tmp_path):
    root = sketch_tree(tmp_path)
    (root / "sketches/a/2.bmp").unlink()
    with pytest.raises(InputError, match="1 images have no sketch of the same name: a/2"):
        sketch_folder(root, 16, paired=True)
    write(root / "sketches/a/2.png", (0, 0, 0))
    write(root / "sketches/b/9.png", (0, 0, 0))
    with pytest.raises(InputError, match="1 sketches have no image of the same name: b/9"):
        sketch_folder(root, 16, paired=True)


def test_bad_folders(tmp_path):
    known = "digits, photos, cifar10, torchvision:NAME, huggingface:NAME or a folder"
    with pytest.raises(InputError, match=f"data must be one of {known}; .* does not exist"):
        load_data(tmp_path / "nowhere", 16)
    (tmp_path / "half" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="sketches is missing"):
        sketch_folder(tmp_path / "half", 16, paired=True)
    with pytest.raises(InputError, match="data digits has no sketches"):
        load_data("digits", 16, sketches="paired")
    tree = sketch_tree(tmp_path / "tree")
    write(tree / "sketches" / "c" / "1.png", (0, 0, 0))
    with pytest.raises(InputError, match="must have the classes of .*, a, b, got a, b, c"):
        sketch_folder(tree, 16, paired=False)
    (tmp_path / "classes" / "empty").mkdir(parents=True)
    write(tmp_path / "classes" / "full" / "1.png", (0, 0, 0))
    with pytest.raises(InputError, match="empty holds no images"):
        image_folder(tmp_path / "classes", 16)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="x.png is not a readable image"):
        image_folder(tmp_path / "bad", 16)
    write(tmp_path / "one" / "1.png", (0, 0, 0))
    with pytest.raises(InputError, match="there must be at least 4 images, there are 1"):
        load_data(tmp_path / "one", 16)


def test_digits_in_color():
    pytest.importorskip("sklearn")
    split = load_data("digits", 16, channels=3)
    assert split.train.images.shape == (1198, 3, 16, 16)


class FakeCIFAR10:
    """Stands in for torchvision's class, without the download."""

    def __init__(self, root, train, download):
        if "offline" in str(root):
            raise OSError("no route to host")
        assert download
        self.data = np.full((6 if train else 4, 32, 32, 3), 7, dtype=np.uint8)
        self.data[..., 2] = 200
        self.targets = [i % 10 for i in range(len(self.data))]
        self.classes = tuple("abcdefghij")

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), self.targets[index]


def test_cifar10(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    monkeypatch.setattr("fastgan.data.libraries.CACHE", tmp_path)
    split = load_data("cifar10", 32)
    assert (len(split.train), len(split.held_out)) == (6, 4)
    assert split.train.images.dtype == torch.uint8
    assert split.train.images[0, :, 0, 0].tolist() == [7, 7, 200]
    assert split.train.class_names == tuple("abcdefghij")
    assert load_data("cifar10", 64).train.images.shape == (6, 3, 64, 64)
    assert load_data("cifar10", 32, channels=1).train.images.shape == (6, 1, 32, 32)
    monkeypatch.setattr("fastgan.data.libraries.CACHE", tmp_path / "offline")
    with pytest.raises(InputError, match="CIFAR10 is not under .*offline/cifar10 and cannot be downloaded .no route"):
        load_data("cifar10", 32)
