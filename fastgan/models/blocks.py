"""Building blocks shared by the generators and discriminators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConditionalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization whose gain and shift are rows of a table, one row a class (Dumoulin et al. 2017).

    The tables are plain parameters, not embeddings: spectral normalization of a whole network leaves them alone, as the
    SAGAN authors' code does.

    Args:
        num_features: C.
        n_classes: rows of the tables.
        eps, momentum: as in ``torch.nn.BatchNorm2d``.
    """

    def __init__(self, num_features: int, n_classes: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=False)
        self.gain = nn.Parameter(torch.ones(n_classes, num_features))
        self.shift = nn.Parameter(torch.zeros(n_classes, num_features))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Normalize ``x`` (n, C, h, w) and scale it by the class of each image, ``labels`` (n,) int64."""
        gain = F.embedding(labels, self.gain)[:, :, None, None]
        shift = F.embedding(labels, self.shift)[:, :, None, None]
        return torch.addcmul(shift, super().forward(x), gain)


class PlainBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization that takes labels and does not look at them: the unconditional twin of the one above."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x)


def batch_norm(num_features: int, n_classes: int) -> ConditionalBatchNorm2d | PlainBatchNorm2d:
    """Class-conditional batch norm, or the plain one for ``n_classes`` 0; both are called with labels."""
    return ConditionalBatchNorm2d(num_features, n_classes) if n_classes else PlainBatchNorm2d(num_features)


class UpBlock(nn.Module):
    """Residual generator block, twice the resolution: batch norm, ReLU, nearest up-sampling, 3x3 convolution, twice.

    Shapes: (n, in_channels, h, w) and labels (n,) to (n, out_channels, 2h, 2w). With ``n_classes`` 0 the labels may be
    None.
    """

    def __init__(self, in_channels: int, out_channels: int, n_classes: int) -> None:
        super().__init__()
        self.norm1 = batch_norm(in_channels, n_classes)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = batch_norm(out_channels, n_classes)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = upsample(F.relu(self.norm1(x, labels)))
        h = self.conv2(F.relu(self.norm2(self.conv1(h), labels)))
        # A 1x1 convolution commutes with nearest up-sampling; this order is four times cheaper.
        return h + upsample(self.skip(x))


class DownBlock(nn.Module):
    """Residual discriminator block: ReLU and 3x3 convolution, twice, then 2x2 average pooling.

    Shapes: (n, in_channels, h, w) to (n, out_channels, h/2, w/2), or (n, out_channels, h, w) without ``downsample``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        downsample: halve the resolution.
        first: the input is an image, so no ReLU comes before the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, downsample: bool = True, first: bool = False) -> None:
        super().__init__()
        self.downsample = downsample
        self.first = first
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        learned_skip = downsample or in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if learned_skip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))
        h = self.conv2(F.relu(h))
        if not self.downsample:
            return h + self.skip(x)
        # A 1x1 convolution commutes with average pooling; this order is four times cheaper.
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))


class ProjectionHead(nn.Module):
    """Logit of a feature vector given its class: w . h + b + <embed(label), h> (Miyato & Koyama 2018).

    Shapes: (n, features) and labels (n,) to (n,).
    """

    def __init__(self, features: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.embed = nn.Embedding(n_classes, features)

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return self.linear(h).squeeze(1) + (self.embed(labels) * h).sum(1)


class PlainHead(nn.Module):
    """Logit of a feature vector, (n, features) to (n,); labels are not looked at."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def forward(self, h: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.linear(h).squeeze(1)


class AuxiliaryHead(nn.Module):
    """Logit and class logits of a feature vector, (n, features) to (n,) and (n, n_classes) (Odena et al. 2017)."""

    def __init__(self, features: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.classes = nn.Linear(features, n_classes)

    def forward(self, h: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.linear(h).squeeze(1), self.classes(h)


HEADS = ("plain", "projection", "auxiliary")


def make_head(kind: str, features: int, n_classes: int) -> nn.Module:
    """A head of :data:`HEADS`, called as ``head(h, labels)``.

    Raises:
        ValueError: there is none of this name, or it needs classes and ``n_classes`` is 0.
    """
    if kind not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}, got {kind!r}")
    if kind == "plain":
        return PlainHead(features)
    if n_classes < 1:
        raise ValueError(f"head {kind!r} needs n_classes of at least 1, got {n_classes}")
    return ProjectionHead(features, n_classes) if kind == "projection" else AuxiliaryHead(features, n_classes)


def join_one_hot(h: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Append the one-hot code of ``labels`` (n,) to the channels of ``h``, (n, c) or (n, c, height, width).

    Returns:
        (n, c + n_classes, ...), the code repeated at every pixel.
    """
    # Compared, not scattered: one_hot checks the range of its input, which waits for the device.
    code = (labels[:, None] == torch.arange(n_classes, device=labels.device)).to(h.dtype)
    return torch.cat([h, code[(...,) + (None,) * (h.ndim - 2)].expand(-1, -1, *h.shape[2:])], 1)


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbor up-sampling by two."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def init_weights(root: nn.Module) -> None:
    """Orthogonal weights and zero biases for every convolution, linear layer and embedding of ``root``, in place.

    All singular values being equal, spectral normalization takes no more signal away than it must: with Gaussian or
    uniform weights the logits of a deep normalized discriminator start near zero, and so do their gradients.
    """
    for module in root.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
