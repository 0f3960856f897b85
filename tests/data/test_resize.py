"""Resizing against its definitions: Pillow and clean-fid, plain bilinear, TensorFlow 1."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data.resize import RESIZE_METHODS, resize_tensor
from tests.data.resizing import resize_array

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [3, 7, 40])
def test_clean_is_pillows_bicubic_in_float(size):
    resized = resize_array(RGB, size, "clean")
    assert resized.shape == (3, size, size)
    assert resized.dtype == torch.float32
    for c in range(3):
        channel = Image.fromarray(RGB[:, :, c].astype(np.float32))
        expected = np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(resized[c].numpy(), expected.clip(0, 255))
    assert resized.min() >= 0
    assert resized.frac().abs().max() > 0.01  # not rounded to integers


@pytest.mark.parametrize("size", [16, 33, 224, 299])
def test_clean_of_tensors_is_clean_of_files_to_the_filters_rounding(size):
    image = RNG.integers(0, 256, (61, 97, 3), dtype=np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    difference = (resize_tensor(tensor, size, "clean")[0] - resize_array(image, size, "clean")).abs().max()
    assert difference < 0.01  # of 255: a hundredth of a gray level


def test_legacy_pytorch_is_plain_bilinear():
    size, (height, width) = 4, RGB.shape[:2]
    resized = resize_array(RGB, size, "legacy_pytorch")
    for i in range(size):
        for j in range(size):
            y, x = (max((p + 0.5) * n / size - 0.5, 0) for p, n in ((i, height), (j, width)))
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            wy, wx = y - y0, x - x0
            top = RGB[y0, x0] * (1 - wx) + RGB[y0, x1] * wx
            bottom = RGB[y1, x0] * (1 - wx) + RGB[y1, x1] * wx
            np.testing.assert_allclose(resized[:, i, j], top * (1 - wy) + bottom * wy, atol=1e-4)


@pytest.mark.parametrize("method", ["clean", "legacy_pytorch"])
@pytest.mark.parametrize("shape", [(32, 32), (400, 331), (299, 299)])
def test_files_are_resized_as_clean_fid_does(method, shape):
    reference = pytest.importorskip("cleanfid.resize").build_resizer(method)
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = torch.from_numpy(np.ascontiguousarray(reference(image))).permute(2, 0, 1)
    assert torch.equal(resize_array(image, 299, method), expected)


@pytest.mark.parametrize("size", [4, 5, 12])
def test_legacy_tensorflow_reads_from_corner_to_corner(size):
    resized = resize_array(RGB, size, "legacy_tensorflow")
    assert resized.shape == (3, size, size)
    height, width = RGB.shape[:2]
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = RGB[y0, x0] + (RGB[y0, x1].astype(float) - RGB[y0, x0]) * (x - x0)
            bottom = RGB[y1, x0] + (RGB[y1, x1].astype(float) - RGB[y1, x0]) * (x - x0)
            np.testing.assert_allclose(resized[:, i, j], top + (bottom - top) * (y - y0), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_tensors_on_the_gpu_are_resized_there(method):
    images = torch.randint(0, 256, (2, 3, 31, 45)).float()
    resized = resize_tensor(images.cuda(), 299, method)
    assert resized.is_cuda
    torch.testing.assert_close(resized.cpu(), resize_tensor(images, 299, method), atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_at_the_size_already_nothing_changes(method):
    image = RGB[:5, :5]
    expected = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))
    assert torch.equal(resize_array(image, 5, method), expected)
    assert torch.equal(resize_tensor(expected[None], 5, method)[0], expected)
