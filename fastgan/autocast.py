"""Ops and autocast."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def outside_autocast(function: F) -> F:
    """``function`` of tensors, computing in the dtypes that it is given even where it is called under autocast.

    An op's body is also called from a captured graph, which knows no autocast: both calls must give the same numbers.
    """

    @functools.wraps(function)
    def body(*args: Any) -> Any:
        with torch.autocast(_first_tensor(args).device.type, enabled=False):
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
