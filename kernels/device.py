"""The device that a launch goes to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_its_device(launcher: Launcher) -> Launcher:
    """Make the device of the first argument, a tensor or a list of tensors, current: Triton launches on that one."""

    @functools.wraps(launcher)
    def launch(first: Any, *args: Any, **kwargs: Any) -> Any:
        tensor: Tensor = first if isinstance(first, Tensor) else first[0]
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return launcher(first, *args, **kwargs)
        return launcher(first, *args, **kwargs)

    return launch  # type: ignore[return-value]
