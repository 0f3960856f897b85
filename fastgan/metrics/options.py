"""The options that the commands share: how features of images are computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgan._checks import InputError
from fastgan.data.resize import RESIZE_METHODS
from fastgan.distributed import World, local_device
from fastgan.metrics.backbones import (
    BACKBONE_NAMES,
    PRECISIONS,
    Backbone,
    is_backbone_name,
    load_backbone,
)
from fastgan.metrics.backbones.inception import download, local_weights
from fastgan.metrics.backbones.inception_network import SPATIAL, SPATIAL_DIM, WITH_SPATIAL
from fastgan.metrics.protocols import PROTOCOLS, Protocol, choose_protocol
from fastgan.metrics.stats import FeatureStats


@dataclass(frozen=True)
class FeatureOptions:
    """None leaves a choice to the statistics given and the machine."""

    backbone: str | None = None
    weights: Path | None = None
    protocol: str | None = None
    resize: str | None = None
    precision: str = "auto"
    device: str | None = None
    dims: int | str | None = None
    batch_size: int = 64
    num_workers: int | None = None
    skip_bad: bool = False
    checkpoint: Path | None = None
    quiet: bool = False
    note: Callable[[str], None] = lambda line: None
    """Called with each line the user should know of."""

    def __post_init__(self) -> None:
        if self.backbone is not None and not is_backbone_name(self.backbone):
            raise InputError(f"--backbone must be {BACKBONE_NAMES}, got {self.backbone}")
        _check_choice("--protocol", self.protocol, tuple(PROTOCOLS))
        _check_choice("--resize", self.resize, RESIZE_METHODS)
        _check_choice("--precision", self.precision, PRECISIONS)

    def torch_device(self) -> torch.device:
        """The device asked for, else this process's GPU, else the CPU. Raises ``InputError`` where it is not usable."""
        if self.device in (None, "cuda") and torch.cuda.is_available():
            return local_device()
        if self.device is None:
            return torch.device("cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--device {self.device} cannot be used: {reason}") from error
        return device

    def network(
        self, loaded: Sequence[FeatureStats], world: World, own: str | None = None, *, spatial: bool = False
    ) -> Backbone:
        """The backbone asked for, else that of the statistics ``loaded``, else the images' ``own``, else Inception, and
        never another in its place. ``spatial`` asks Inception for sFID's features too.

        Raises:
            InputError: there is no such network, or its weights are not at hand; the message lists the ways out.
        """
        recorded = next((stats.backbone for stats in loaded if stats.backbone), "")
        # statistics computed with other weights than the published ones bear their hash behind the name
        name = self.backbone or re.sub(r"-[0-9a-f]{8}$", "", recorded) or own or "inception"
        if not is_backbone_name(name):
            raise InputError(f"the backbone of the statistics must be {BACKBONE_NAMES}, got {name}")
        dims = self.dims
        if name == "inception" and dims is None and loaded:
            dims = SPATIAL if loaded[0].dim == SPATIAL_DIM else loaded[0].dim
        if name == "inception" and spatial and dims in (None, 2048):
            dims = WITH_SPATIAL
        with world.agreed():
            if name == "inception" and self.weights is None and world.is_first:
                local_weights() or download()  # once, and not by all processes at a time
        with world.agreed():
            return load_backbone(
                name, weights=self.weights, dims=dims, device=self.torch_device(), precision=self.precision
            )

    def chosen_protocol(self, loaded: Sequence[FeatureStats], network: Backbone) -> Protocol:
        """The protocol asked for, else that of the statistics ``loaded``, else the network's default."""
        recorded = next((stats.protocol for stats in loaded if stats.protocol), None)
        name = self.protocol or recorded
        try:
            return choose_protocol(network.name, name, self.resize)
        except ValueError as error:
            raise InputError(f"the statistics cannot be used: {error}") from error


def _check_choice(option: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise InputError(f"{option} must be one of {', '.join(allowed)}, got {value}")
