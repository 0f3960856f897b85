"""Tar files, WebDataset shards, files of several arrays, and datasets in Python."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan._checks import InputError
from fastgan.data import image_folder
from fastgan.data.archives import ImageArray, ImageDataset, open_images
from fastgan.data.tar_files import ImageTar

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def pixels(source):
    return torch.cat(list(source.batches(None, batch_size=4))).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_a_tar_file(tmp_path, name, mode):
    files = {f"set/{i}.png": png(image) for i, image in enumerate(IMAGES)}
    write_tar(tmp_path / name, {"set/._0.png": b"x", "notes.txt": b"x", **files}, mode)
    source = open_images(tmp_path / name)
    assert isinstance(source, ImageTar)
    np.testing.assert_array_equal(pixels(source), IMAGES)
    assert source.left_out == "1 hidden, 1 no image (.txt)"


def test_shards_with_classes(tmp_path):
    for shard in range(2):
        files = {}
        for i in range(3):
            files[f"{i}.png"] = png(IMAGES[3 * shard + i])
            files[f"{i}.cls"] = str(shard + i % 2).encode()
        write_tar(tmp_path / f"{shard:06}.tar", files)
    source = open_images(tmp_path)
    np.testing.assert_array_equal(pixels(source), IMAGES)
    assert source.classes() == (("0", "1", "2"), [0, 1, 0, 1, 2, 1])
    assert image_folder(tmp_path, 8).labels.tolist() == [0, 1, 0, 1, 2, 1]
    write_tar(tmp_path / "000002.tar", {"9.png": png(IMAGES[0])})
    with pytest.raises(InputError, match="9.png has no class beside it"):
        open_images(tmp_path).classes()
    write_tar(tmp_path / "000002.tar", {"9.png": png(IMAGES[0]), "9.cls": b"cat"})
    with pytest.raises(InputError, match="9.cls must hold a class"):
        open_images(tmp_path)


def test_damaged_tar_files(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": b"damaged", "1.png": png(IMAGES[1])})
    with pytest.raises(InputError, match=r"a\.tar/0\.png is not a readable image"):
        pixels(open_images(tmp_path / "a.tar"))
    np.testing.assert_array_equal(pixels(open_images(tmp_path / "a.tar", skip_bad=True)), IMAGES[1:2])
    write_tar(tmp_path / "b.tar", {"notes.txt": b"x"})
    with pytest.raises(InputError, match="holds no images"):
        open_images(tmp_path / "b.tar")


def test_files_of_several_arrays(tmp_path):
    tensor = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    torch.save({"images": tensor, "labels": torch.arange(6) % 2, "step": torch.tensor(3)}, tmp_path / "a.pt")
    torch.save(list(tensor), tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", first=IMAGES[::-1], second=IMAGES)
    for source in (
        open_images(tmp_path / "a.pt"),
        open_images(tmp_path / "b.pt"),
        open_images(tmp_path / "c.npz", key="second"),
    ):
        assert isinstance(source, ImageArray)
        np.testing.assert_array_equal(pixels(source), IMAGES)
    assert open_images(tmp_path / "a.pt").classes() == (("0", "1"), [0, 1, 0, 1, 0, 1])
    torch.save([tensor[0], tensor[1, :, :4]], tmp_path / "d.pt")
    for call, message in (
        (lambda: open_images(tmp_path / "c.npz"), "must hold statistics .* it has: first, second"),
        (lambda: open_images(tmp_path / "c.npz", key="third"), "must hold images under third, it has: first, second"),
        (lambda: open_images(tmp_path / "d.pt"), "images of one size"),
        (lambda: open_images(tmp_path, key="x"), "key must be None"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"] = IMAGES, np.arange(6)
    source = open_images(tmp_path / "a.h5")
    np.testing.assert_array_equal(pixels(source), IMAGES)
    assert source.classes()[1] == list(range(6))


class Pairs:
    """Pillow images with labels, as in torchvision's datasets."""

    classes = ("cat", "dog")

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return Image.fromarray(IMAGES[index]), index % 2


def test_datasets():
    source = open_images(Pairs())
    assert isinstance(source, ImageDataset)
    np.testing.assert_array_equal(pixels(source), IMAGES)
    assert source.classes() == (("cat", "dog"), [0, 1, 0, 1, 0, 1])
    hugging_face = [{"img": Image.fromarray(image)} for image in IMAGES]
    tensors = [torch.from_numpy(image).permute(2, 0, 1) / 255 for image in IMAGES]
    for dataset in (hugging_face, list(IMAGES), tensors):
        np.testing.assert_allclose(pixels(open_images(dataset)), IMAGES, atol=1e-4)
    for dataset, message in (([], "holds no images"), (iter([]), "a dataset with a length")):
        with pytest.raises(InputError, match=message):
            open_images(dataset)
    with pytest.raises(InputError, match=r"list\[0\] must be a Pillow image"):
        pixels(open_images(["text"]))
