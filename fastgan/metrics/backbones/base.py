"""The interface of a feature network: images in their usual forms in, float32 feature vectors out."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan._checks import FLOATS, InputError, check_tensor
from fastgan.data.resize import resize_tensor
from fastgan.metrics.protocols import Protocol, choose_protocol

PRECISIONS = ("auto", "fp32", "tf32", "bf16")

# on a CPU a batch this small keeps the early, wide feature maps in cache: up to twice the throughput of 64
_CPU_CHUNK = 16
_GPU_CHUNK = 256

_COMPILE_FROM, _COMPILE_PACKED_FROM = 1500, 15_000


class Backbone(nn.Module):
    """A network that maps images to feature vectors: a module that moves with its parent, and changes in nothing else.

    The network is a constant. It follows ``.to``, ``.cuda()`` and the like to another device, also within a parent
    module, but keeps its precision and eval mode; it has no entry in ``parameters()`` or ``state_dict()``.

    Args:
        network: any module or callable from images (n, 3, h, w), float32, after ``normalize``, to features (n, dim), or
            (n, dim, h', w'), which are averaged over h' and w'. A module is moved to ``device`` and put in eval mode.
        name: reported with every distance.
        dim: features per image; None takes it from the first call.
        extra: further features per image behind the ``dim`` ones, which are for another distance, such as sFID's.
        input_size: height and width of the network's input; None feeds images at the size they have.
        normalize: from pixels in [0, 255] to the network's input; None divides by 255. ``"protocol"`` leaves the range
            to the protocol, as for Inception.
        device: where the network runs.
        precision: of the network's arithmetic: ``"fp32"``, ``"tf32"``, ``"bf16"``, or ``"auto"``, see
            :func:`resolve_precision`. The features are float32 in all cases.
        own: fastgan owns the network and may modify it: bf16 then converts its weights once, where autocast would do so
            at each call, and :meth:`compile` may compile it.
        head: from features (n, dim) to class scores (n, classes), for the inception score.
        pack: of an ``own`` network: called once its weights are final, if it runs on a CPU where :func:`can_pack`.

    >>> from fastgan.metrics import Backbone
    >>> mean_color = Backbone(lambda x: x.mean((2, 3)), name="mean color")
    >>> mean_color(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    head: Callable[[Tensor], Tensor] | None
    _network: Callable[[Tensor], Tensor]

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        name: str,
        dim: int | None = None,
        extra: int = 0,
        input_size: int | None = None,
        normalize: Callable[[Tensor], Tensor] | str | None = None,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        own: bool = False,
        head: Callable[[Tensor], Tensor] | None = None,
        pack: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.dim = dim
        self.extra = extra
        self.input_size = input_size
        self.device = torch.device(device)
        self._wanted_precision = precision
        resolve_precision(precision, self.device)  # raises
        self._normalize = _to_unit_range if normalize is None else normalize
        if isinstance(self._normalize, str) and self._normalize != "protocol":
            raise ValueError(f"normalize must be a callable, 'protocol' or None, got {normalize!r}")
        self._own = own and isinstance(network, nn.Module)
        self._input_dtype = torch.bfloat16 if self._own and self.precision == "bf16" else torch.float32
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._compiled_size = 0
        # not as submodules: no parent's optimizer, state dict, dtype or training mode may reach a constant
        self.__dict__["_network"] = network
        self.__dict__["head"] = head
        for module in self._modules_held():
            module.to(self.device).eval()
        if self._own and isinstance(network, nn.Module):
            network.to(self._input_dtype)
        self._pack = pack
        self._packed = False
        self._pack_weights()
        self.eval()

    @property
    def precision(self) -> str:
        """Precision of the network's arithmetic on its device: ``"fp32"``, ``"tf32"`` or ``"bf16"``."""
        return resolve_precision(self._wanted_precision, self.device)

    @property
    def compile_from(self) -> int:
        """Number of images from which on the compilation costs less time than it saves."""
        return _COMPILE_PACKED_FROM if self._packed else _COMPILE_FROM

    def compile(self) -> Backbone:  # type: ignore[override]
        """Compile the network at its next call, which takes half a minute or so on a CPU; the features stay, to
        rounding. A network that is not ``own`` is left as it is. Returns self."""
        if self._own and self._compiled is None:
            self._compiled = torch.compile(self._network, dynamic=False)
        return self

    def forward(self, images: Tensor, *, protocol: str | Protocol | None = None, resize: str | None = None) -> Tensor:
        """Features (n, dim), float32, of images (n, 3, h, w) or grayscale (n, 1, h, w), which are repeated.

        Images are uint8 in [0, 255] or floating-point in [0, 1], on any device. ``protocol`` is a name of
        :mod:`fastgan.metrics.protocols`, by default the network's own, and ``resize`` replaces its resize method.

        Raises:
            ValueError: ``images`` has another rank, number of channels or dtype, is empty, or is floating-point with
                values outside [0, 1] or not finite; or there is no such protocol.
        """
        check_images(images)
        chosen = choose_protocol(self.name, protocol, resize)
        features = []
        for part in images.detach().split(self._chunk):
            pixels = part.to(self.device)
            if chosen.truncate and pixels.is_floating_point():
                pixels = (pixels * 255).to(torch.uint8)
            # float64 images too are pixels of at most 16 bits; half precision would round the resized ones
            pixels = pixels.float() if pixels.dtype == torch.uint8 else pixels.float() * 255
            if self.input_size is not None:
                pixels = resize_tensor(pixels, self.input_size, chosen.resize)
            features.append(self._features(pixels.expand(-1, 3, -1, -1), chosen))
        return torch.cat(features)

    def from_pixels(self, pixels: Tensor, protocol: str | Protocol | None = None) -> Tensor:
        """Features of float32 images (n, 3, h, w) of the network's size, in [0, 255]."""
        chosen = choose_protocol(self.name, protocol)
        return torch.cat([self._features(part.to(self.device), chosen) for part in pixels.split(self._chunk)])

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode, whatever ``mode`` says. Returns self."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Take the device alone from what ``.to``, ``.cuda()``, ``.half()`` and the like would do."""
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self.device = device
            for module in self._modules_held():
                module.to(device)
            compiled, self._compiled = self._compiled is not None, None
            self._pack_weights()
            if compiled:
                self.compile()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled network; copies compile their own if asked to."""
        return {**self.__dict__, "_compiled": None}

    def _modules_held(self) -> list[nn.Module]:
        return [held for held in (self._network, self.head) if isinstance(held, nn.Module)]

    def _pack_weights(self) -> None:
        if self._pack is not None and not self._packed and self.device.type == "cpu" and can_pack(self._input_dtype):
            self._pack()
            self._packed = True

    @property
    def _chunk(self) -> int:
        return _CPU_CHUNK if self.device.type == "cpu" else _GPU_CHUNK

    def _features(self, pixels: Tensor, protocol: Protocol) -> Tensor:
        n, precision = pixels.shape[0], self.precision
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=precision == "bf16" and self._input_dtype == torch.float32
        )
        for module in self._modules_held():
            if module.training:  # a parent of it may have been put in train mode
                module.eval()
        normalize = protocol.to_inception if isinstance(self._normalize, str) else self._normalize
        with torch.inference_mode(), autocast, float32_arithmetic(precision, self.device):
            inputs = normalize(pixels).to(self._input_dtype).contiguous(memory_format=torch.channels_last)
            features = self._run_compiled(inputs) if self._compiled is not None else self._network(inputs)
        if features.ndim == 4:
            features = features.float().mean(dim=(2, 3))
        if features.ndim != 2 or features.shape[0] != n:
            raise ValueError(
                f"backbone {self.name} must return features of shape ({n}, dim), got {tuple(features.shape)}"
            )
        if self.dim is None:
            self.dim = features.shape[1] - self.extra
        if features.shape[1] != self.dim + self.extra:
            wanted = self.dim + self.extra
            raise ValueError(f"backbone {self.name} must return {wanted} features per image, got {features.shape[1]}")
        return features.float().clone()  # a clone made outside inference mode is an ordinary tensor

    def _run_compiled(self, inputs: Tensor) -> Tensor:
        """One shape, one graph: a smaller batch than before is filled up with copies of its first image."""
        assert self._compiled is not None
        n = inputs.shape[0]
        self._compiled_size = max(self._compiled_size, n)
        missing = self._compiled_size - n
        if missing:
            filling = inputs[:1].expand(missing, -1, -1, -1)
            inputs = torch.cat([inputs, filling]).contiguous(memory_format=torch.channels_last)
        frozen: AbstractContextManager[Any] = nullcontext()
        if self.device.type == "cpu":  # weights become constants of the graph, packed for oneDNN with the ReLU fused
            import torch._inductor.config as inductor

            frozen = inductor.patch(freezing=True)
        with frozen:
            return self._compiled(inputs)[:n]

    def __repr__(self) -> str:
        return (
            f"Backbone({self.name!r}, dim={self.dim}, input_size={self.input_size}, "
            f"device={str(self.device)!r}, precision={self.precision!r})"
        )


def resolve_precision(precision: str, device: torch.device) -> str:
    """``"fp32"``, ``"tf32"`` or ``"bf16"`` for ``precision`` on ``device``.

    ``"auto"`` is tf32 on a GPU that has it and fp32 elsewhere. bf16 is never chosen unasked: its rounding changes a
    Frechet distance by more than 0.01.

    Raises:
        ValueError: ``precision`` is unknown.
        InputError: tf32 on a device that has none.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto":
        return "tf32" if has_tf32 else "fp32"
    if precision == "tf32" and not has_tf32:
        raise InputError(f"precision tf32 needs a GPU of compute capability 8.0 or newer, the device is {device}")
    return precision


@contextmanager
def float32_arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Convolutions and matrix products of float32 in full precision, or in tf32 for ``"tf32"``; CUDA's alone.

    torch's own default is tf32 for convolutions, which "fp32" must not mean.
    """
    if device.type != "cuda":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    wanted = "tf32" if precision == "tf32" else "ieee"
    try:
        for backend in backends:
            backend.fp32_precision = wanted
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


class PackedConvolution:
    """relu(conv(x)) on a CPU, to rounding, in one call of oneDNN; the weights are packed at the first call and must not
    change after it.

    ``torch.compile`` makes the same of a network with frozen weights, in half a minute.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = conv
        self._options = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
        self._weight: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed weights, which cannot be pickled; copies repack."""
        return {**self.__dict__, "_weight": None}

    def __call__(self, x: Tensor) -> Tensor:
        if self._weight is None:
            weight = self._conv.weight.detach()
            self._weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._options, [*x.shape])
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._conv.bias, *self._options, "relu", [None], ""
        )


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Return whether this torch has the private calls that packing needs, and they compute what they should."""
    conv = nn.utils.skip_init(nn.Conv2d, 3, 4, 3, stride=2, padding=1, dtype=dtype)
    with torch.inference_mode():
        for values in (x := torch.empty(1, 3, 7, 5, dtype=dtype), conv.weight, conv.bias):
            values.copy_(torch.linspace(-1, 1, values.numel()).view_as(values))
        x = x.contiguous(memory_format=torch.channels_last)
        try:
            return torch.allclose(PackedConvolution(conv)(x), F.relu(conv(x)), rtol=1e-2, atol=1e-2)
        except (AttributeError, RuntimeError, TypeError):
            return False


def check_images(images: Tensor) -> None:
    """Raise unless ``images`` is (n, 1 or 3, h, w), not empty, and uint8 or floating-point in [0, 1]."""
    check_tensor("images", images, ndim=4, dtypes=(torch.uint8, *FLOATS))
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, (n, c, h, w), got shape {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return
    low, high = (bound.item() for bound in torch.aminmax(images.detach()))
    if not (low >= 0 and high <= 1):  # also where there is a NaN
        raise ValueError(
            f"images of dtype {images.dtype} must lie in [0, 1] (uint8: [0, 255]), got [{low:g}, {high:g}]"
        )


def fold_batch_norm(module: nn.Module, conv: str, bn: str) -> None:
    """Fold the batch normalization ``module.bn`` into ``module.conv``, without a bias, whose output it takes; in place,
    for eval mode."""
    convolution, norm = getattr(module, conv), getattr(module, bn)
    with torch.no_grad():
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        convolution.weight.mul_(scale[:, None, None, None])
        convolution.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    setattr(module, bn, nn.Identity())


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict without unpickling anything else. Raises ``InputError`` naming the file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights file {path} cannot be read as a state dict: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights file {path} must hold a state dict of tensors")
    return state


def load_state(network: nn.Module, state: dict[str, Tensor], path: str | Path, *, assign: bool = False) -> None:
    """Load ``state`` into ``network``, all of it; ``assign`` takes its tensors instead of copying them. Raises
    ``InputError`` naming the file where they do not fit."""
    try:
        network.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise InputError(f"weights file {path} does not fit {type(network).__name__}: {details[:200]}") from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file; torch's weights carry its first eight digits in their names."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _to_unit_range(pixels: Tensor) -> Tensor:
    return pixels / 255
