"""Everything that a train step can see: modules, tensors, containers, closures and globals."""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgan._random_state import GENERATORS
from fastgan.training.ema import EMA

LIMIT = 100_000
MISSING = object()
ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, type)
_SKIPPED = (types.ModuleType, torch.cuda.Stream)
# The code of these packages counts as constant; the values that users pass to it do not.
_LIBRARIES = {"torch", "torchvision", "functorch", "numpy", "scipy", "triton", "fastgan", *sys.stdlib_module_names}
# The machinery of other updates, and objects that count steps by themselves.
_OURS = ("fastgan.training.step", "fastgan.training.trainer")
_WITH_COUNTERS = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
_ROOTS_WITH_COUNTERS = ("optimizer", "scaler")
_PER_MODULE = ("_parameters", "_buffers", "_modules")


class Reachable:
    """Everything that can be reached from ``roots``, by the path that leads there.

    Walks attributes, containers, closures, default arguments, and the globals that functions name. Code of torch,
    NumPy, SciPy, fastgan and the standard library is not entered. Of an object of a user's class that derives from no
    library, only attributes are entered that code on the way names. Optimizers are entered as roots alone.

    Attributes:
        containers: path -> live dict, list, set or deque. Attributes of an object are its ``__dict__``.
        classes: path -> the attributes of a class that users wrote.
        cells: path -> closure cell.
        names: path of a function's globals -> the globals, and the names that it uses of them.
        plain: path of an object of a user's class -> its attributes, and the names of its class's.
        read: all names and strings in the code on the way.
        tensors: path -> tensor, each tensor once.
        arrays: path -> NumPy array, each once.
        generators: path -> random number generator of torch, NumPy or Python, each once.
    """

    def __init__(self, roots: dict[str, Any]) -> None:
        modules = ((name, root) for name, root in roots.items() if isinstance(root, nn.Module))
        self._names = {id(p): f"{name}.{key}" for name, root in modules for key, p in root.named_parameters()}
        self.containers: dict[str, Any] = {}
        self.classes: dict[str, Any] = {}
        self.cells: dict[str, types.CellType] = {}
        self.names: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.generators: dict[str, Any] = {}
        self.plain: dict[str, tuple[dict[str, Any], set[str]]] = {}
        self.read: set[str] = set()
        self._unread: list[tuple[str, str, Any]] = []
        self._alive: list[Any] = []  # so that no id is used twice
        self._seen: set[int] = set()
        pending = deque(roots.items())
        while pending or self._now_read(pending):
            path, value = pending.popleft()
            if isinstance(value, ATOMS + _SKIPPED) and not self._is_user_class(value):
                continue
            if id(value) in self._seen:
                continue
            self._seen.add(id(value))
            self._alive.append(value)
            if len(self._alive) > LIMIT:
                raise ValueError(f"more than {LIMIT} objects can be reached from its networks and losses, as {path}")
            pending.extend(self._below(path, value))

    def _now_read(self, pending: deque[tuple[str, Any]]) -> bool:
        """Enter attributes that were left out and are named by code found since; return whether any are pending."""
        pending.extend((path, value) for path, key, value in self._unread if key in self.read)
        self._unread = [(path, key, value) for path, key, value in self._unread if key not in self.read]
        return bool(pending)

    @staticmethod
    def _is_user_class(value: Any) -> bool:
        return isinstance(value, type) and not _of_library(value)

    def _below(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Tensor):
            _put(self.tensors, path, value)
            return
        if isinstance(value, np.ndarray):
            _put(self.arrays, path, value)
            return
        if isinstance(value, GENERATORS):
            _put(self.generators, path, value)
            return
        if isinstance(value, type):
            _put(self.classes, path, value.__dict__)
            yield from ((f"{path}.{key}", item) for key, item in list(value.__dict__.items()) if not _is_dunder(key))
            yield from ((f"{path}:{base.__name__}", base) for base in value.__bases__)
        elif isinstance(value, dict):
            _put(self.containers, path, value)
            for i, (key, item) in enumerate(list(value.items())):
                below = joined(path, key) if isinstance(key, ATOMS) else f"{path}[{self._names.get(id(key), i)}]"
                yield below, item
        elif isinstance(value, (list, tuple, deque)):
            if not isinstance(value, tuple):
                _put(self.containers, path, value)
            yield from ((f"{path}[{i}]", item) for i, item in enumerate(list(value)))
        elif isinstance(value, (set, frozenset)):
            if isinstance(value, set):
                _put(self.containers, path, value)
            yield from ((f"{path}{{}}", item) for item in list(value))
        elif isinstance(value, types.FunctionType):
            yield from self._of_function(path, value)
        elif isinstance(value, types.MethodType):
            yield path, value.__self__
            yield f"{path}()", value.__func__
        elif isinstance(value, (staticmethod, classmethod)):
            yield path + "()", value.__func__
        elif isinstance(value, property):
            yield from ((f"{path}.{name}", f) for name in ("fget", "fset") if (f := getattr(value, name)) is not None)
        elif isinstance(value, types.BuiltinFunctionType):
            if not isinstance(value.__self__, (types.ModuleType, type(None))):
                yield path, value.__self__  # such as list.append of a user's list
        else:
            yield from self._of_object(path, value)

    def _of_function(self, path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        if _of_library(function):
            return
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            _put(self.cells, f"{path}<{name}>", cell)
            yield name, content
        yield from ((f"{path}={i}", item) for i, item in enumerate(function.__defaults__ or ()))
        yield from ((f"{path}={name}", item) for name, item in (function.__kwdefaults__ or {}).items())
        self.read |= _names_of(code)
        scope = function.__globals__
        names = tuple(sorted(name for name in _names_of(code) if name in scope))
        names = tuple(name for name in names if not isinstance(scope[name], types.ModuleType))
        if names:
            _put(self.names, path, (scope, names))
            yield from ((name, scope[name]) for name in names)

    def _of_object(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        attributes = getattr(value, "__dict__", None)
        if type(value).__module__.startswith(_OURS) or (
            isinstance(value, _WITH_COUNTERS) and path.partition(".")[0] not in _ROOTS_WITH_COUNTERS
        ):
            return
        owners = type(value).__mro__[:-1]
        if isinstance(attributes, dict) and owners and not any(map(_of_library, owners)):
            self.plain[path] = attributes, {key for owner in owners for key in owner.__dict__}
            self._unread += [(f"{path}.{key}", key, item) for key, item in list(attributes.items())]
        elif isinstance(attributes, dict):
            _put(self.containers, path, attributes)
            self._seen.add(id(attributes))
            for key, item in list(attributes.items()):
                if isinstance(value, EMA) and key in EMA.REACHED_TWICE:
                    continue
                if isinstance(value, nn.Module) and key in _PER_MODULE:
                    _put(self.containers, f"{path}.{key}", item)
                    yield from ((f"{path}.{name}", held) for name, held in list(item.items()))
                elif not (isinstance(value, nn.Module) and ("state_dict" in key or "persistent" in key)):
                    yield f"{path}.{key}", item
        for owner in type(value).__mro__:
            slots = owner.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if not _of_library(owner) and hasattr(value, name):
                    yield f"{path}.{name}", getattr(value, name)
        if not _of_library(type(value)):
            yield type(value).__name__, type(value)
        if isinstance(value, partial):
            yield from ((f"{path}()", part) for part in (value.func, value.args, value.keywords))


def copied(live: Any) -> Any:
    return next(kind(live) for kind in (dict, list, set, deque) if isinstance(live, kind))


def first_change(live: Any, kept: Any) -> Any:
    """The key or position of a changed item, None if the number of items has changed, ``MISSING`` if nothing has."""
    if isinstance(live, (dict, types.MappingProxyType)):
        for key, value in live.items():
            if not same(value, kept.get(key, MISSING)):
                return key
        return next((key for key in kept if key not in live), MISSING)
    if isinstance(live, set):
        return MISSING if len(live) == len(kept) and all(item in kept for item in live) else None
    if len(live) != len(kept):
        return None
    return next((i for i, (x, y) in enumerate(zip(live, kept, strict=True)) if not same(x, y)), MISSING)


def same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or not isinstance(a, (*ATOMS, tuple, types.MethodType, types.BuiltinFunctionType)):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (isinstance(a, float) and a != a and b != b)


def _put(found: dict[str, Any], path: str, value: Any) -> None:
    while path in found:
        path += "'"
    found[path] = value


def joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]"


def _names_of(code: types.CodeType) -> set[str]:
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return strings.union(code.co_names, *map(_names_of, inner))


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _of_library(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _LIBRARIES
