"""The survey of a set of images, and its description."""

import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan._checks import InputError
from fastgan.data import image_folder, load_data
from fastgan.data.archives import ImageArray, open_images
from fastgan.data.decode import Decoding
from fastgan.data.survey import survey


def write(path, image=(0, 0, 0), size=(20, 20), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.new(mode, size, image)).save(path, **options)
    return path


def test_sizes_and_modes_are_counted(tmp_path):
    first = write(tmp_path / "a.png")
    write(tmp_path / "b.png", 0, mode="L")
    write(tmp_path / "c.png", (0, 0, 0, 9), (30, 10), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "d.jpg", size=(40, 20), exif=exif)
    write(tmp_path / "e.png", Image.fromarray(np.full((64, 64), 4000, dtype=np.uint16)))
    (tmp_path / "f.png").write_bytes(b"broken")
    found = survey(open_images(tmp_path))
    assert (len(found), found.gray, found.alpha, found.turned, found.deep, found.most) == (5, 2, 1, 1, 1, 4000)
    assert found.sizes[(20, 40)] == 1  # turned
    assert found.not_square == 2
    assert found.files["a.png"] == f"{zlib.crc32(first.read_bytes()):08x}"
    assert "f.png" in found.files
    assert found.describe() == "5 images 30x10 to 64x64 RGB (2 gray, 1 with alpha)"


@pytest.mark.parametrize(("side", "resolution"), [(8, 32), (32, 32), (63, 32), (64, 64), (100, 64), (600, 128)])
def test_the_resolution_follows_from_the_shorter_side(side, resolution):
    array = ImageArray(np.zeros((3, side, side + 9, 3), dtype=np.uint8))
    assert survey(array).resolution == resolution


def class_folders(root, n=4, names="abcd"):
    for name in names:
        for i in range(n):
            write(root / name / f"{i}.png", (40 * i, 9, ord(name)))
    return root


def test_findings_are_described(tmp_path):
    split = load_data(class_folders(tmp_path), None, held_out=0.25)
    assert split.found == "16 images 20x20 RGB, 4 classes: a 4, b 4, c 4, d 4"
    assert split.train.images.shape == (12, 3, 32, 32)
    assert len(split.files) == 16
    assert split.notes == ()


def test_a_stray_image_is_named(tmp_path):
    write(class_folders(tmp_path) / "cover.jpg")
    split = load_data(tmp_path, 16)
    assert split.train.n_classes == 1
    assert "cover.jpg lies beside the folders a, b, c, ..." in split.notes[0]
    write(tmp_path / "cover2.jpg")
    assert "cover.jpg and 1 more images lie beside" in load_data(tmp_path, 16).notes[0]


def test_splits_are_no_classes(tmp_path):
    for part in ("train", "val"):
        class_folders(tmp_path / part)
    with pytest.raises(InputError, match=r"look like the splits of one data set.*: train on .*/train"):
        load_data(tmp_path, 16)
    assert load_data(tmp_path / "train", 16, held_out=0.25).train.class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(("n", "names"), [(10, "a"), (2, "abcd"), (1, "abcdef")])
def test_few_images_leave_two_to_score_against(tmp_path, n, names):
    split = load_data(class_folders(tmp_path, n, names), 16)
    assert len(split.held_out) == 2
    assert len(split.train) == n * len(names) - 2
    whole = torch.cat([split.train.labels, split.held_out.labels]).bincount()
    assert whole.tolist() == [n] * len(names)


def test_the_last_image_of_a_class_is_trained_on(tmp_path):
    class_folders(tmp_path, 6, "a")
    class_folders(tmp_path, 1, "b")
    class_folders(tmp_path, 1, "c")
    split = load_data(tmp_path, 16)
    assert split.held_out.labels.tolist() == [0, 0]
    assert split.notes == ()


def test_classes_without_images_are_named(tmp_path):
    split = load_data(class_folders(tmp_path, 1), 16)
    gone = sorted("abcd"[label] for label in split.held_out.labels)
    assert split.notes == (f"2 of 4 classes have no image to train on: {', '.join(gone)}",)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[f"{name}/0.png", 7] for name in "abcd"]}))
    assert "7 of 8 classes have no image to train on: 0, 1, 2," in load_data(tmp_path, 16).notes[0]


def test_all_images_cannot_be_held_out(tmp_path):
    with pytest.raises(InputError, match="held_out must leave images in both parts of 16, got 0.99"):
        load_data(class_folders(tmp_path), 16, held_out=0.99)


def test_transparent_pixels_take_the_background(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", (200, 0, 0, 0), mode="RGBA")
    split = load_data(tmp_path, 16)
    assert split.train.images.unique().tolist() == [255]
    assert "4 images have alpha: composited on background=[255, 255, 255]" in split.notes
    dark = load_data(tmp_path, 16, decoding=Decoding(background=(0, 9, 0)))
    assert dark.train.images[0, :, 0, 0].tolist() == [0, 9, 0]


def test_sixteen_bits_that_hold_twelve(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", Image.fromarray(np.full((16, 16), 1365 * i, dtype=np.uint16)))
    split = load_data(tmp_path, 16)
    assert "4 images of 16 bits reach only 4095 of 65535 and are dark: value_range=[0, 4095]" in split.notes[0]
    scaled = image_folder(tmp_path, 16, decoding=Decoding(value_range=(0, 4095)))
    assert scaled.images[:, 0, 0, 0].tolist() == [0, 85, 170, 255]


def test_floating_point_images_need_a_range(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.tiff", Image.fromarray(np.full((16, 16), i / 2, dtype=np.float32)))
    with pytest.raises(InputError, match=r"floating-point images need a value_range"):
        load_data(tmp_path, 16)
    data = image_folder(tmp_path, 16, decoding=Decoding(value_range=(0.0, 1.0)))
    assert data.images[:, 0, 0, 0].tolist() == [0, 128, 255, 255]
    assert "16-bit" not in " ".join(load_data(tmp_path, 16, decoding=Decoding(value_range=(0.0, 1.0))).notes)


def test_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    for i in range(4):
        write(tmp_path / f"{i}.png", image, exif=exif)
    split = load_data(tmp_path, 16)
    assert split.train.images[0, 0, :, 0].tolist() == [0] * 8 + [255] * 8
    assert "4 images are turned as their EXIF orientation says" in split.notes


@pytest.mark.parametrize(("fit", "row"), [("crop", [9] * 16), ("pad", [255] * 4 + [9] * 8 + [255] * 4)])
def test_images_that_are_not_square(tmp_path, fit, row):
    for i in range(4):
        write(tmp_path / f"{i}.png", (9, 9, 9), (32, 16))
    split = load_data(tmp_path, 16, fit=fit)
    assert split.train.images[0, 0, :, 8].tolist() == row
    assert split.notes[0].startswith("4 images are not square: they are ")
    with pytest.raises(ValueError, match="fit must be one of 'crop', 'pad', 'stretch', got 'squeeze'"):
        load_data(tmp_path, 16, fit="squeeze")


def test_stretching_keeps_both_ends(tmp_path):
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (28, 0, 32, 16))
    for i in range(4):
        write(tmp_path / f"{i}.png", image)
    assert load_data(tmp_path, 16, fit="stretch").train.images[0, 0, 0, -1] > 200
    assert load_data(tmp_path, 16).train.images.max() < 50


def test_sketches_follow_from_the_folder(tmp_path):
    for name in "abcd":
        write(tmp_path / "images" / f"{name}.png")
    assert load_data(tmp_path / "images", 16, sketches="auto").sketches == "edges"
    for name in "abcd":
        write(tmp_path / "sketches" / f"{name}.jpg")
    split = load_data(tmp_path, 16, sketches="auto")
    assert split.sketches == "paired"
    assert split.train.paired
    assert set(split.files) == {path for n in "abcd" for path in (f"images/{n}.png", f"sketches/{n}.jpg")}
    write(tmp_path / "sketches" / "e.png")
    split = load_data(tmp_path, 16, sketches="auto")
    assert split.sketches == "unpaired"
    assert len(split.train.sketches) == 5
