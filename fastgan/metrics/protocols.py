"""Protocols: all that happens to an image between its file and a feature network, and so what a distance depends on.

Each is read from the code of the package it is named after and tested against it (``tests/metrics/test_protocols.py``).
Their distances differ by some percent, so statistics carry the protocol's name and are compared within
one protocol only.

===============  ===================  ==============  =========================
name             resize               Inception gets  floating-point images
===============  ===================  ==============  =========================
pytorch-fid      legacy_pytorch       x / 127.5 - 1   kept
clean-fid        clean                (x - 128)/128   kept
torch-fidelity   legacy_tensorflow    (x - 128)/128   kept
torchmetrics     bilinear_antialias   (x - 128)/128   truncated to 8 bits
tensorflow       legacy_tensorflow    (x - 128)/128   kept
===============  ===================  ==============  =========================

The weights are the same in all: those of the TensorFlow graph of 2015-12-05. Files have 8 bits, so the last column
matters for tensors only. Networks other than Inception keep their own input range; of a protocol they take the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fastgan._checks import InputError
from fastgan.data.resize import check_resize


@dataclass(frozen=True)
class Protocol:
    """The way from an image to a network's input.

    Attributes:
        name: as printed and kept in files of statistics.
        resize: a method of :mod:`fastgan.data.resize`.
        center, scale: Inception's input is (pixel - center) / scale, for pixels in [0, 255].
        truncate: floating-point images in [0, 1] are multiplied by 255 and cut to 8 bits before they are resized.

    Example:
        >>> get_protocol("clean-fid").resize
        'clean'
    """

    name: str
    resize: str
    center: float
    scale: float
    truncate: bool = False

    def to_inception(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 255] to Inception's input."""
        return (pixels - self.center) / self.scale

    def resized_by(self, method: str | None) -> Protocol:
        """This protocol with another resize method, and then another name; itself if ``method`` is None or its own."""
        if method is None or method == self.resize:
            return self
        check_resize(method)
        return replace(self, name=f"{self.name}+{method}", resize=method)

    def __str__(self) -> str:
        return self.name


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("pytorch-fid", "legacy_pytorch", 127.5, 127.5),
        Protocol("clean-fid", "clean", 128, 128),
        Protocol("torch-fidelity", "legacy_tensorflow", 128, 128),
        Protocol("torchmetrics", "bilinear_antialias", 128, 128, truncate=True),
        Protocol("tensorflow", "legacy_tensorflow", 128, 128),
    )
}


def get_protocol(name: str | Protocol, resize: str | None = None) -> Protocol:
    """The protocol of this name, such as ``"clean-fid"`` or ``"pytorch-fid+clean"``, perhaps with another resize.

    >>> get_protocol("pytorch-fid", resize="clean").name
    'pytorch-fid+clean'

    Raises:
        InputError: there is no such protocol.
        ValueError: there is no such resize method.
    """
    if isinstance(name, Protocol):
        return name.resized_by(resize)
    base, _, method = name.partition("+")
    if base not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name}")
    return PROTOCOLS[base].resized_by(resize or method or None)


def default_protocol(network: str) -> str:
    """Return the protocol for a network of this name if none is asked for, everywhere.

    It is pytorch-fid's for Inception, and clean-fid's for others, whose authors resize with antialiasing.

    The classes of :mod:`fastgan.metrics.torchmetrics_api` alone default to ``"torchmetrics"``.
    """
    return "pytorch-fid" if network.startswith("inception") else "clean-fid"


def choose_protocol(network: str, protocol: str | Protocol | None, resize: str | None = None) -> Protocol:
    """The protocol asked for, else the network's default. Raises as :func:`get_protocol`."""
    return get_protocol(default_protocol(network) if protocol is None else protocol, resize)


def protocol_of_old_file(backbone: str | None, resize: str | None) -> str | None:
    """The protocol of statistics that fastgan wrote before it named protocols: Inception's input was pytorch-fid's."""
    if resize is None or backbone is None:
        return None
    return get_protocol(default_protocol(backbone), resize).name
