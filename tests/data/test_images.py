"""The digits, labeled images and their split."""

import sys

import numpy as np
import pytest
import torch

from fastgan.data import LabeledImages, as_float, digits, stratified_split
from fastgan.data.images import mostly_color


def labeled(n=10, n_classes=3):
    return LabeledImages(
        torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1), torch.arange(n) % n_classes, n_classes=n_classes
    )


def identities(images):
    return images.flatten().long().tolist()


class TestDigits:
    @pytest.fixture(autouse=True)
    def _needs_scikit_learn(self):
        pytest.importorskip("sklearn")

    def test_shapes_and_range(self):
        for part, n in zip(digits(), (1198, 599), strict=True):
            assert part.images.shape == (n, 1, 32, 32)
            assert part.images.dtype == torch.float32
            assert part.labels.dtype == torch.int64
            assert part.n_classes == 10
            assert part.images.min() == -1
            assert part.images.max() == 1

    def test_split_is_disjoint_and_stratified(self):
        train, held_out = digits(8)
        in_train = {tuple(row) for row in train.images.flatten(1).tolist()}
        assert not any(tuple(row) in in_train for row in held_out.images.flatten(1).tolist())
        totals = (train.labels.bincount() + held_out.labels.bincount()).double()
        assert (held_out.labels.bincount() - totals / 3).abs().max() <= 0.5

    def test_split_is_complete_with_original_pixels_at_native_resolution(self):
        from sklearn.datasets import load_digits

        train, held_out = digits(8)
        pixels = torch.cat([train.images, held_out.images]).flatten(1)
        expected = torch.from_numpy(load_digits().data).float() / 8 - 1
        assert sorted(pixels.tolist()) == sorted(expected.tolist())

    def test_upsampling_is_bicubic(self):
        from PIL import Image

        small, large = digits(8)[0], digits(32)[0]
        assert torch.equal(small.labels, large.labels)
        for i in range(0, len(small), 100):
            image = Image.fromarray(small.images[i, 0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
            expected = torch.from_numpy(np.array(image)).clamp(-1, 1)
            torch.testing.assert_close(large.images[i, 0], expected, rtol=0, atol=2e-6)

    def test_seed(self):
        assert torch.equal(digits(8, seed=3)[1].images, digits(8, seed=3)[1].images)
        assert not torch.equal(digits(8, seed=3)[1].images, digits(8, seed=4)[1].images)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"held_out must be in \(0, 1\)"):
            digits(held_out=1)
        with pytest.raises(ValueError, match="resolution must be at least 1"):
            digits(0)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fastgan\[demo\]'"):
        digits()


def test_split_keeps_order_and_every_class():
    train, held_out = stratified_split(labeled(12), held_out=0.25, seed=1)
    assert identities(train.images) == sorted(identities(train.images))
    assert held_out.labels.bincount(minlength=3).tolist() == [1, 1, 1]


class TestLabeledImages:
    @pytest.mark.parametrize(
        ("images", "labels", "match"),
        [
            (torch.zeros(2, 8, 8), torch.zeros(2, dtype=torch.int64), "images must have 4 dimensions"),
            (torch.zeros(2, 1, 8, 8), torch.zeros(2), "labels must have dtype int64"),
            (torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64), r"labels must have shape \(2,\)"),
            (torch.zeros(2, 1, 8, 8), torch.tensor([0, 3]), r"labels must be in \[0, 3\), got 0 to 3"),
            (torch.zeros(2, 1, 8, 8), torch.tensor([-1, 2]), r"labels must be in \[0, 3\), got -1 to 2"),
            (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), "at least one image"),
        ],
    )
    def test_bad_input(self, images, labels, match):
        with pytest.raises(ValueError, match=match):
            LabeledImages(images, labels, n_classes=3)

    def test_bad_sketches(self):
        images, labels = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 2])
        with pytest.raises(ValueError, match="paired sketches must be as many as the images, 4, got 3"):
            LabeledImages(images, labels, 3, sketches=torch.zeros(3, 1, 8, 8))
        with pytest.raises(ValueError, match=r"sketches must be as large as the images, \(8, 8\), got \(4, 4\)"):
            LabeledImages(images, labels, 3, sketches=torch.zeros(4, 1, 4, 4))
        with pytest.raises(ValueError, match="class 2 has none"):
            LabeledImages(images, labels, 3, sketches=torch.zeros(2, 1, 8, 8), sketch_labels=torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="sketch_labels need sketches"):
            LabeledImages(images, labels, 3, sketch_labels=torch.tensor([0, 1]))

    def test_subset_keeps_pairs(self):
        images = torch.arange(4.0)[:, None, None, None]
        data = LabeledImages(images, torch.tensor([0, 1, 0, 1]), 2, sketches=images + 10)
        part = data.subset(torch.tensor([3, 0]))
        assert part.sketches.flatten().tolist() == [13, 10]
        assert part.labels.tolist() == [1, 0]


def test_as_float_spans_the_range():
    assert as_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    exact = torch.tensor([0.5])
    assert as_float(exact) is exact


def test_mostly_color():
    gray = torch.full((1001, 3, 2, 2), 7, dtype=torch.uint8)
    colored = gray.clone()
    colored[:501, 1] = 9
    assert mostly_color(colored)
    assert not mostly_color(colored[1:])  # half of them
    assert not mostly_color(gray[:, :1])
