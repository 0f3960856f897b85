"""Zip files, arrays and what openers add, beside folders."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data.archives import ImageArray, ImageZip, open_images, register_opener
from fastgan.data.image_sources import ImageFolder, ImageSource
from fastgan.metrics import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def zipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("notes.txt", "no image")
        for i, image in enumerate(IMAGES):
            file.writestr(f"deep/{i}.PNG", png(image))
    return tmp_path / "images.zip"


def pixels(source, **options):
    return torch.cat(list(source.batches(None, batch_size=2, **options))).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_zip_file(zipped, workers):
    source = open_images(zipped)
    assert isinstance(source, ImageZip)
    np.testing.assert_array_equal(pixels(source, num_workers=workers), IMAGES)
    np.testing.assert_array_equal(pixels(source, indices=[4, 1]), IMAGES[[4, 1]])


def test_a_bad_image_in_a_zip_file(zipped):
    with zipfile.ZipFile(zipped, "a") as file:
        file.writestr("bad.png", b"")
    with pytest.raises(InputError, match=r"images\.zip/bad\.png is not a readable image \(0 bytes\)"):
        pixels(open_images(zipped))
    source = open_images(zipped, skip_bad=True)
    np.testing.assert_array_equal(pixels(source), IMAGES)
    assert source.skipped == [f"{zipped}/bad.png"]


def test_unusable_files(zipped, tmp_path):
    content = bytearray(zipped.read_bytes())
    content[60:90] = b"x" * 30  # inside an image: the checksum fails
    (tmp_path / "cut.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"cut\.zip/deep/0\.PNG cannot be read"):
        pixels(open_images(tmp_path / "cut.zip"))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as file:
        file.writestr("notes.txt", "no image")
    with pytest.raises(InputError, match=r"empty\.zip holds no images"):
        open_images(tmp_path / "empty.zip")
    (tmp_path / "list.txt").write_text("a.png")
    with pytest.raises(InputError, match=r"list\.txt is neither a folder of images, a zip file nor one of \.npz"):
        open_images(tmp_path / "list.txt")
    with pytest.raises(InputError, match=r"none\.zip: no such folder"):
        open_images(tmp_path / "none.zip")


@pytest.mark.parametrize(
    "array",
    [
        IMAGES,
        IMAGES.transpose(0, 3, 1, 2),
        (IMAGES / 255).astype(np.float32),
        torch.from_numpy(IMAGES).permute(0, 3, 1, 2).double() / 255,
    ],
)
def test_arrays(array):
    np.testing.assert_allclose(pixels(ImageArray(array)), IMAGES, atol=1e-4)


def test_a_grayscale_array_is_repeated():
    gray = np.repeat(IMAGES[..., :1], 3, axis=3)
    for array in (IMAGES[..., 0], IMAGES[..., :1], IMAGES[:, None, :, :, 0]):
        np.testing.assert_array_equal(pixels(ImageArray(array)), gray)


@pytest.mark.parametrize("key", ["images", "arr_0", "anything"])
def test_npz_files(tmp_path, key):
    np.savez(tmp_path / "a.npz", **{key: IMAGES})
    np.testing.assert_array_equal(pixels(open_images(tmp_path / "a.npz")), IMAGES)
    np.savez(tmp_path / "b.npz", labels=np.zeros(5), images=IMAGES)
    np.testing.assert_array_equal(pixels(open_images(tmp_path / "b.npz")), IMAGES)


def test_npy_and_tensor_files(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    torch.save(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), tmp_path / "a.pt")
    for name in ("a.npy", "a.pt"):
        np.testing.assert_array_equal(pixels(open_images(tmp_path / name)), IMAGES)
    np.save(tmp_path / "b.npy", np.array([None]))
    torch.save({"mean": torch.zeros(2), "step": torch.zeros(1)}, tmp_path / "b.pt")
    torch.save(torch.full((2, 3, 4, 4), 3.0), tmp_path / "c.pt")
    (tmp_path / "d.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:200])
    for name, message in (
        ("b.npy", "cannot be read: .*bject"),
        ("b.pt", "must hold .*images.*, it has: mean, step"),
        ("c.pt", r"must lie in \[0, 1\]"),
        ("d.pt", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message) as error:
            open_images(tmp_path / name)
        assert name in str(error.value)


def test_few_images_are_in_memory_at_a_time():
    """However many there are: those of the batch, of two more, and what the threads are at."""
    ahead, yielded = [], 0

    class Endless(ImageSource):
        def __len__(self):
            return 10**9

        def read(self, index):
            ahead.append(index - yielded)
            return IMAGES[index % 5]

        def name(self, index):
            return str(index)

    batches = Endless("endless").batches(None, batch_size=4, num_workers=2)
    for _ in range(100):
        yielded += len(next(batches))
    batches.close()
    assert max(ahead) <= 4 * 3 + 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, r"float32 must lie in \[0, 1\] \(uint8: \[0, 255\]\), got \[0, 25"),
        ({"images": np.full((2, 4, 4, 3), np.nan)}, "must hold finite values"),
        ({"images": IMAGES.astype(np.int64)}, "got dtype int64"),
        ({"images": IMAGES[:0]}, "must hold images"),
        ({"images": IMAGES[..., :2]}, r"c = 1 or 3, got shape \(5, 6, 4, 2\)"),
        ({"a": IMAGES, "b": IMAGES}, "or images as one of images, arr_0, x, samples, it has: a, b"),
        ({}, "it has: nothing"),
        ({"images": np.array([None])}, "pickled objects, which are never loaded"),
    ],
)
def test_unusable_npz_files(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        open_images(tmp_path / "a.npz")
    assert "a.npz" in str(error.value)


def test_images_of_different_sizes_need_a_size(tmp_path):
    for i, image in enumerate((IMAGES[0], IMAGES[1][:3])):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=r"different sizes \(3x4, 6x4\) need a backbone with an input_size"):
        pixels(ImageFolder(tmp_path))


def test_an_opener_is_asked_first(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.data.archives._openers", [])

    def run_folder(path, skip_bad):
        if not (path / "run.yaml").is_file():
            return None
        source = ImageArray(IMAGES, label=str(path))
        source.reference = path / "data"
        return source

    register_opener(run_folder)
    register_opener(run_folder)
    (tmp_path / "run.yaml").write_text("")
    assert open_images(tmp_path).reference == tmp_path / "data"
    with pytest.raises(InputError, match="no such folder"):
        open_images(tmp_path / "other")
