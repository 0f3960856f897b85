"""The choice of the files that belong to a set of images, in folders and in archives, for metrics and for training."""

import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan._checks import InputError
from fastgan.data import image_folder, load_data, sketch_folder
from fastgan.data.archives import open_images
from fastgan.data.decode import read_image
from fastgan.data.find import find_images, search_folder, select_images

COUNTED = ["a/1.png", "a/2.JFIF", "b/1.jpe", "b/2.tga"]
NEVER = [
    ".hidden.png",
    "a/._1.png",
    "a/.ipynb_checkpoints/1-checkpoint.png",
    ".git/objects/1.png",
    "__MACOSX/a/._1.png",
    "__macosx/1.png",
    "Thumbs.db",
    "a/thumbs.db",
    "a/notes.txt",
    "png",
]


def write(path, color=(9, 9, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".png": "png", ".jfif": "jpeg", ".jpe": "jpeg", ".tga": "tga"}.get(path.suffix.lower())
    if kind is None:
        path.write_bytes(b"no image")
    else:
        Image.new("RGB", (8, 8), color).save(path, kind)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / ".cache" / "set"  # what lies above the root does not matter
    for name in COUNTED + NEVER:
        write(root / name)
    return root


def test_folders_and_archives_agree(tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for name in reversed(COUNTED + NEVER):
            file.write(tree / name, f"set/{name}")
    assert [str(path.relative_to(tree)) for path in find_images(tree)] == COUNTED
    zipped = open_images(tmp_path / "set.zip")
    assert zipped.names == [f"set/{name}" for name in COUNTED]
    assert zipped.classes() == open_images(tree).classes() == (("a", "b"), [0, 0, 1, 1])


def test_left_out_files_are_counted(tree, tmp_path):
    found = search_folder(tree)
    assert found.left_out == {"hidden": 4, "system files": 4, "no image": 2}
    assert found.left_out_line() == "4 hidden, 2 no image (.txt, no extension), 4 system files"
    lines = []
    data = image_folder(tree, 8, tell=lines.append)
    assert lines == [f"{tree}: left out {found.left_out_line()}"]
    assert data.class_names == ("a", "b")
    write(tmp_path / "clean" / "1.png")
    image_folder(tmp_path / "clean", 8, tell=lines.append)
    assert len(lines) == 1


def test_left_out_files_alone_are_no_images(tmp_path):
    write(tmp_path / ".1.png")
    with pytest.raises(InputError, match=r"holds no images \(.*\); left out: 1 hidden"):
        find_images(tmp_path)


def test_formats_that_this_pillow_cannot_read_are_counted(monkeypatch):
    monkeypatch.setattr("fastgan.data.find.image_extensions", lambda: frozenset(("png",)))
    found = select_images(["1.png", "2.avif", "3.jp2"])
    assert ([str(path) for path in found.paths], found.left_out_line()) == (
        ["1.png"],
        "2 in a format that this Pillow cannot read",
    )


@pytest.mark.parametrize("extension", ["jfif", "avif", "jp2", "tga", "ico", "webp", "tif", "jpe", "pbm", "pnm"])
def test_formats_are_decoded(tmp_path, extension):
    from fastgan.data.find import image_extensions

    if extension not in image_extensions():
        pytest.skip("this Pillow was built without it")
    formats = {"jfif": "jpeg", "jpe": "jpeg", "jp2": "jpeg2000", "tif": "tiff", "pnm": "ppm", "pbm": "ppm"}
    path = tmp_path / f"a.{extension}"
    Image.new("RGB", (16, 16), (200, 100, 50)).save(path, formats.get(extension, extension))
    assert find_images(tmp_path) == [path]
    assert np.abs(read_image(path).astype(int) - (200, 100, 50)).max() <= 3


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "set" / "a" / "1.png")
    write(tmp_path / "elsewhere" / "2.png", (1, 1, 1))
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")  # twice the same folder is no circle
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    found = search_folder(tmp_path / "set")
    assert [str(path) for path in found.paths] == ["a/1.png", "b/2.png", "c/2.png"]
    assert found.left_out == {"links back to a folder around them": 3}
    data = image_folder(tmp_path / "set", 8, tell=lambda line: None)
    assert (data.class_names, data.labels.tolist()) == (("a", "b", "c"), [0, 1, 2])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path / "a" / "1.png")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(InputError, match="cannot read folder .*a: Permission denied"):
            find_images(tmp_path)
    finally:
        (tmp_path / "a").chmod(0o700)


def test_hidden_class_folders_are_no_empty_classes(tmp_path):
    write(tmp_path / "a" / "1.png")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    assert image_folder(tmp_path, 8, tell=lambda line: None).class_names == ("a",)


def test_training_reads_archives_and_arrays(tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for name in COUNTED:
            file.write(tree / name, name)
    zipped, folder = (image_folder(source, 8, tell=lambda line: None) for source in (tmp_path / "set.zip", tree))
    assert torch.equal(zipped.images, folder.images)
    assert zipped.class_names == folder.class_names
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0, 2, 0, 2, 1, 1])
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    split = load_data(tmp_path / "set.npz", 8, held_out=0.5)
    assert sorted(split.train.labels.tolist()) == sorted(split.held_out.labels.tolist()) == [0, 1, 2]
    whole = image_folder(tmp_path / "set.npz", 8)
    assert torch.equal(whole.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert whole.labels.tolist() == labels.tolist()
    np.savez(tmp_path / "float.npz", images=images / 255.0)
    assert torch.equal(image_folder(tmp_path / "float.npz", 8).images, whole.images)


@pytest.mark.parametrize("labels", [[0, 1], [[0], [1], [2], [3], [4], [-1]], [0.0] * 6])
def test_bad_labels_are_refused(tmp_path, labels):
    np.savez(tmp_path / "set.npz", images=np.zeros((6, 8, 8, 3), dtype=np.uint8), labels=np.array(labels))
    with pytest.raises(InputError, match="labels of .*set.npz must be (6 )?integers from 0"):
        image_folder(tmp_path / "set.npz", 8)


def test_bad_images_are_skipped_and_counted_in_training(tmp_path):
    for name in ("images/a/1.png", "images/a/2.png", "images/b/1.png", "images/b/2.png"):
        write(tmp_path / name, (int(name[-5]) * 50,) * 3)
        write(tmp_path / name.replace("images", "sketches"))
    (tmp_path / "images/a/2.png").write_bytes(b"damaged")
    (tmp_path / "sketches/b/1.png").write_bytes(b"damaged")
    lines = []
    with pytest.raises(InputError, match="2.png is not a readable image"):
        image_folder(tmp_path / "images", 8)
    data = image_folder(tmp_path / "images", 8, skip_bad=True, tell=lines.append)
    assert data.labels.tolist() == [0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [50, 50, 100]
    assert lines == [f"{tmp_path / 'images'}: left out 1 unreadable"]
    pairs = sketch_folder(tmp_path, 8, paired=True, skip_bad=True, tell=lines.append)
    assert pairs.images[:, 0, 0, 0].tolist() == [50, 100]
    assert len(pairs.sketches) == 2
    assert len(lines) == 3
    (tmp_path / "images/a/1.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match="holds no image that can be read"):
        image_folder(tmp_path / "images/a", 8, skip_bad=True)
