"""Folders of images: formats, conversion to RGB, batches, damaged files."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data.decode import read_image
from fastgan.data.image_sources import find_images
from fastgan.data.resize import RESIZE_METHODS
from fastgan.metrics import ImageFolder, InputError
from tests.data.resizing import resize_array

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Nine distinct images of several sizes, some in subfolders, beside files that are no images."""
    for i in range(9):
        path = tmp_path / ("deep/er" if i % 3 == 0 else ".") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (8 + i, 12 - i, 3), dtype=np.uint8)).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "png").write_text("no extension")
    return tmp_path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.PPM", "a.tif", "a.TIFF", "a.webp"])
def test_lossless_formats(tmp_path, name):
    Image.fromarray(RGB).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert find_images(tmp_path) == [tmp_path / name]
    np.testing.assert_array_equal(read_image(tmp_path / name), RGB)


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg"])
def test_jpeg(tmp_path, name):
    flat = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    Image.fromarray(flat).save(tmp_path / name, quality=95)
    assert np.abs(read_image(tmp_path / name).astype(int) - flat).max() <= 3


def test_modes_become_rgb(tmp_path):
    def read(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        result = read_image(tmp_path / name)
        assert result.dtype == np.uint8
        return result

    gray = RGB[:, :, 0]
    repeated = np.repeat(gray[:, :, None], 3, axis=2)
    alpha = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    np.testing.assert_array_equal(read(Image.fromarray(gray)), repeated)
    np.testing.assert_array_equal(read(Image.fromarray(np.concatenate([repeated[:, :, :1], alpha], axis=2))), repeated)
    np.testing.assert_array_equal(read(Image.fromarray(np.concatenate([RGB, alpha], axis=2))), RGB)
    np.testing.assert_array_equal(read(Image.fromarray(gray > 100)), np.where(repeated > 100, 255, 0))
    palette = Image.fromarray(RGB).quantize(8)
    np.testing.assert_array_equal(read(palette), np.array(palette.convert("RGB")))
    np.testing.assert_array_equal(read(palette, "a.gif"), np.array(palette.convert("RGB")))
    np.testing.assert_array_equal(read(palette, transparency=3), np.array(palette.convert("RGB")))
    cmyk = Image.fromarray(RGB).convert("CMYK")
    np.testing.assert_array_equal(read(cmyk, "a.tif"), np.array(cmyk.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grayscale_is_scaled(tmp_path, name):
    values = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    expected = np.round(values / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("color_type", [2, 6])
def test_sixteen_bit_colors_keep_the_upper_byte(tmp_path, color_type):
    """Files without and with alpha, written by hand: Pillow writes no such files."""
    values = RNG.integers(0, 65536, (5, 7, 3 if color_type == 2 else 4), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 7, 5, 16, color_type, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), (values[:, :, :3] >> 8).astype(np.uint8))


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif cannot be read as an image: floating-point images"):
        read_image(tmp_path / "a.tif")


def test_found_recursively_in_the_order_of_paths(folder):
    found = find_images(folder)
    assert len(found) == 9
    assert found == sorted(folder.rglob("*.png"))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 9, 50])
def test_batches_hold_every_image_once_in_order(folder, workers, batch_size):
    done = []
    images = ImageFolder(folder)
    batches = list(images.batches(6, batch_size=batch_size, num_workers=workers, progress=done.append))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sum(done) == 9
    expected = torch.stack([resize_array(read_image(path), 6, "clean") for path in images.paths])
    assert torch.equal(torch.cat(batches), expected)


@pytest.mark.parametrize("resize", RESIZE_METHODS)
def test_images_are_resized_one_by_one_or_together_alike(folder, resize):
    """Images of many sizes, and of one size, where a batch is resized at once."""
    (folder / "same").mkdir()
    for i in range(3):
        Image.fromarray(RNG.integers(0, 256, (9, 14, 3), dtype=np.uint8)).save(folder / "same" / f"{i}.png")
    for root in (folder, folder / "same"):
        images = ImageFolder(root)
        expected = torch.stack([resize_array(read_image(path), 6, resize) for path in images.paths])
        torch.testing.assert_close(torch.cat(list(images.batches(6, resize=resize))), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_an_unreadable_image_is_named_or_skipped(folder, workers, damage):
    bad = folder / "deep" / "bad.png"
    good = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    good.save(bad)
    contents = {"empty": b"", "text": b"hello", "truncated": bad.read_bytes()[:3000]}
    bad.write_bytes(contents[damage])
    with pytest.raises(InputError, match=r"deep/bad\.png"):
        list(ImageFolder(folder).batches(6, num_workers=workers))
    images = ImageFolder(folder, skip_bad=True)
    assert sum(len(batch) for batch in images.batches(6, batch_size=2, num_workers=workers)) == 9
    assert images.skipped == [str(bad)]


def test_a_changed_image_changes_the_fingerprint(folder):
    before = ImageFolder(folder).fingerprint()
    assert ImageFolder(folder).fingerprint() == before
    Image.fromarray(RGB).save(folder / "1.png")
    assert ImageFolder(folder).fingerprint() != before


def test_no_folder_and_no_images(tmp_path):
    with pytest.raises(InputError, match="none: no such folder"):
        ImageFolder(tmp_path / "none")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(InputError, match=r"is not a folder of images"):
        ImageFolder(tmp_path / "file.txt")
    with pytest.raises(InputError, match="holds no images"):
        ImageFolder(tmp_path)


def test_wrong_arguments(folder):
    images = ImageFolder(folder)
    for wrong, message in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        (
            {"resize": "area"},
            "resize must be one of 'clean', 'legacy_pytorch', .*, got 'area'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            next(images.batches(6, **wrong))
