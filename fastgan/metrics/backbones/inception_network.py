"""The network behind the FID: Inception-v3 as the TensorFlow graph of 2015-12-05 computes it.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016. Modules bear torchvision's names, so
that state dicts are the same. Not torchvision's classes: their import brings torch._dynamo along, three seconds before
the first image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.metrics.backbones.base import PackedConvolution, fold_batch_norm

DIMS = (64, 192, 768, 2048)
LOGITS = ("logits", "logits_unbiased")
CLASSES = 1008
SPATIAL, WITH_SPATIAL = "spatial", "2048+spatial"
SPATIAL_DIM = 17 * 17 * 7
"""sFID's features: the first 7 channels of ``Mixed_6d.branch1x1``, TensorFlow's ``mixed_6/conv``, at 17 x 17 places."""


class InceptionV3(nn.Module):
    """(n, 3, 299, 299) images in [-1, 1] to pooled features (n, dims) in float32, or to (n, 1008) logits.

    ``dims`` may also be ``"spatial"``, for sFID's features (n, 2023) in the order of height, width and channel, or
    ``"2048+spatial"``, for the pooled ones and these side by side (n, 4071). The average pools of the A, C and first E
    blocks do not count padding, and the last E block pools by maximum.
    """

    def __init__(self, dims: int | str = DIMS[-1]) -> None:
        super().__init__()
        self.dims = dims
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pooled=32)
        self.Mixed_5c = InceptionA(256, pooled=64)
        self.Mixed_5d = InceptionA(288, pooled=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        if self.dims in (SPATIAL, WITH_SPATIAL):
            before = self._until_6c(images)
            spatial = self.Mixed_6d.branch1x1(before)[:, :7].float().permute(0, 2, 3, 1).flatten(1)
            if self.dims == SPATIAL:
                return spatial
            pooled = self._after_6c(before).float().mean(dim=(2, 3))
            return torch.cat([pooled, spatial], dim=1)
        x = self._maps(images).float().mean(dim=(2, 3))
        if self.dims not in LOGITS:
            return x
        return F.linear(x, self.fc.weight.float(), self.fc.bias.float() if self.dims == "logits" else None)

    def _maps(self, images: Tensor) -> Tensor:
        if self.dims in (64, 192):
            return self._first_maps(images)
        x = self._until_6c(images)
        return self.Mixed_6e(self.Mixed_6d(x)) if self.dims == 768 else self._after_6c(x)

    def _first_maps(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images))), 3, stride=2)
        if self.dims == 64:
            return x
        return F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)

    def _until_6c(self, images: Tensor) -> Tensor:
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self._first_maps(images))))
        return self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))

    def _after_6c(self, x: Tensor) -> Tensor:
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))

    def fold_batch_norm(self) -> InceptionV3:
        """Fold every batch normalization into the convolution before it; the outputs stay, in eval mode."""
        for module in self.modules():
            if isinstance(module, ConvNorm) and not isinstance(module.bn, nn.Identity):
                fold_batch_norm(module, "conv", "bn")
        return self

    def pack(self) -> InceptionV3:
        """Once folded, take :class:`PackedConvolution` for what is not compiled, on a CPU."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.packed = PackedConvolution(module.conv)
        return self


class ConvNorm(nn.Module):
    """Convolution, batch normalization, ReLU."""

    packed: PackedConvolution | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.packed(x)
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _row(in_channels: int, out_channels: int, size: int) -> ConvNorm:
    return ConvNorm(in_channels, out_channels, (1, size), padding=(0, size // 2))


def _column(in_channels: int, out_channels: int, size: int) -> ConvNorm:
    return ConvNorm(in_channels, out_channels, (size, 1), padding=(size // 2, 0))


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35 x 35."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 64, 1)
        self.branch5x5_1 = ConvNorm(channels, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average_pool(x)),
        ]
        return torch.cat(branches, 1)


class InceptionB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """17 x 17, 768 channels; ``inner`` of them between the long filters."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, inner, 1)
        self.branch7x7_2 = _row(inner, inner, 7)
        self.branch7x7_3 = _column(inner, 192, 7)
        self.branch7x7dbl_1 = ConvNorm(768, inner, 1)
        self.branch7x7dbl_2 = _column(inner, inner, 7)
        self.branch7x7dbl_3 = _row(inner, inner, 7)
        self.branch7x7dbl_4 = _column(inner, inner, 7)
        self.branch7x7dbl_5 = _row(inner, 192, 7)
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average_pool(x)),
        ]
        return torch.cat(branches, 1)


class InceptionD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(long), F.max_pool2d(x, 3, stride=2)]
        return torch.cat(branches, 1)


class InceptionE(nn.Module):
    """8 x 8."""

    def __init__(self, channels: int, *, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvNorm(channels, 320, 1)
        self.branch3x3_1 = ConvNorm(channels, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = ConvNorm(channels, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = ConvNorm(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, kernel_size=3, stride=1, padding=1) if self.max_pool else _average_pool(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)
