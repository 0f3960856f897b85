"""One image resized as a source of images resizes it."""

import torch

from fastgan.data.resize import channels_first, clean_with_pillow, resize_tensor


def resize_array(image, size, method):
    """An image (h, w, 3), uint8 or float32 in [0, 255], as float32 (3, size, size)."""
    if method == "clean":
        return torch.from_numpy(clean_with_pillow(image, size)).float()
    return resize_tensor(torch.from_numpy(channels_first(image)).float()[None], size, method)[0]
