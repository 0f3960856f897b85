"""Ops and autocast."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype where it is active and applies to ``x``, else None."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block without autocast on the device of ``x``; there is none on "meta"."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def outside_autocast(function: F) -> F:
    """``function`` of tensors, computing in the dtypes that it is given even where it is called under autocast.

    An op's body is also called from a captured graph, which knows no autocast: both calls must give the same numbers.
    """

    @functools.wraps(function)
    def body(*args: Any) -> Any:
        with no_autocast(_first_tensor(args)):
            return function(*args)

    # An op's schema is read from these types, which the names of this module would not resolve.
    body.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return body  # type: ignore[return-value]


def _first_tensor(args: Iterable[Any]) -> Tensor:
    for arg in args:
        for value in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(value, Tensor):
                return value
    raise TypeError("no tensor among the arguments")
