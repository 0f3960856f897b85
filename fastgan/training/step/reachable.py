"""Find what a train step can see: modules, tensors, containers, closures and globals; keep it, compare it, watch it.

A captured graph holds the Python values that it was traced with. :class:`Watch` notices when one of them changes,
:class:`Snapshot` restores everything after a trial, and :func:`differences` lists how the results of two trials differ.
"""

from __future__ import annotations

import random
import re
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgan._random_state import GENERATORS, set_state, state_of

LIMIT = 100_000
_MISSING = object()
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, type)
_SKIPPED = (types.ModuleType, torch.cuda.Stream)
# The code of these packages counts as constant; the values that users pass to it do not.
_LIBRARIES = {"torch", "torchvision", "functorch", "numpy", "scipy", "triton", "fastgan", *sys.stdlib_module_names}
# The machinery of other updates, and objects that count steps by themselves.
_OURS = ("fastgan.training.step", "fastgan.training.trainer")
_WITH_COUNTERS = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
_ROOTS_WITH_COUNTERS = ("optimizer", "scaler")
_OF_OPTIMIZER = re.compile(r"(optimizer(?:\.\w+)?)\.state\[(.+)\]\.(\w+)")
_OF_AVERAGE = re.compile(r"ema(?:\.\w+)?\.module\.(.+)")
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
            if isinstance(value, _ATOMS + _SKIPPED) and not self._is_user_class(value):
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
                below = _joined(path, key) if isinstance(key, _ATOMS) else f"{path}[{self._names.get(id(key), i)}]"
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


class Watch:
    """Checks, by a few comparisons mostly in C, whether a Python value that a graph may hold has changed."""

    def __init__(self, roots: dict[str, Any]) -> None:
        reached = Reachable(roots)
        # A buffer that forward puts in another's place is state, not a constant: see capture.Fit.
        self._paths = [path for path in reached.containers if not path.endswith("._buffers")]
        self._live = [reached.containers[path] for path in self._paths]
        self._kept = [_copied(live) for live in self._live]
        self._paths += list(reached.classes)
        self._live += list(reached.classes.values())
        self._kept += [dict(attributes) for attributes in reached.classes.values()]
        self._cells = list(reached.cells.items())
        self._contents = [cell.cell_contents for _, cell in self._cells]
        self._scopes = [(scope, itemgetter(names[0], *names), names) for scope, names in reached.names.values()]
        self._absent = []
        for attributes, of_class in reached.plain.values():
            if names := tuple(key for key in attributes if key in reached.read):
                self._scopes.append((attributes, itemgetter(names[0], *names), names))
            self._absent.append((attributes.keys(), (of_class & reached.read) - attributes.keys()))
        self._globals = [get(scope) for scope, get, _ in self._scopes]
        self._arrays = list(reached.arrays.items())
        self._bytes = [array.tobytes() for _, array in self._arrays]
        self._alive = reached

    def ignore(self, attributes: dict[str, Any], key: str) -> None:
        """Take one entry of a watched container to be written before it is read."""
        for i, live in enumerate(self._live):
            if live is attributes:
                del self._paths[i], self._live[i], self._kept[i]
                names = tuple(attributes)
                self._scopes.append((attributes, itemgetter(names[0], *names), names))
                self._globals.append(self._scopes[-1][1](attributes))
                break
        for i, (scope, _, names) in enumerate(self._scopes):
            if scope is attributes:
                left = tuple(name for name in names if name != key)
                get = itemgetter(left[0], *left)
                self._scopes[i], self._globals[i] = (scope, get, left), get(scope)

    def changed(self) -> str | None:
        """Return the path of a value that has changed, or None."""
        try:
            if (
                self._live == self._kept
                and [cell.cell_contents for _, cell in self._cells] == self._contents
                and [get(scope) for scope, get, _ in self._scopes] == self._globals
                and all([keys.isdisjoint(absent) for keys, absent in self._absent])
                and (not self._arrays or [array.tobytes() for _, array in self._arrays] == self._bytes)
            ):
                return None
        except (RuntimeError, ValueError, KeyError, TypeError):  # another tensor or array; a name that is gone
            pass
        return self._named()

    def _named(self) -> str | None:
        for path, live, kept in zip(self._paths, self._live, self._kept, strict=True):
            if (key := _first_change(live, kept)) is not _MISSING:
                return _joined(path, key) if isinstance(live, (dict, types.MappingProxyType)) else path
        for (path, cell), content in zip(self._cells, self._contents, strict=True):
            if not _same(cell.cell_contents, content):
                return path
        for (scope, _, names), kept in zip(self._scopes, self._globals, strict=True):
            for name, value in zip(names, kept[1:], strict=True):
                if not _same(scope.get(name, _MISSING), value):
                    return name
        for keys, absent in self._absent:
            for name in absent & keys:
                return name
        for (path, array), content in zip(self._arrays, self._bytes, strict=True):
            if array.tobytes() != content:
                return path
        return None


class Snapshot:
    """Values of everything that can be reached from ``roots``, of gradients, and of all random number generators."""

    def __init__(self, roots: dict[str, Any], rng: torch.Generator | None = None) -> None:
        self._reached = reached = Reachable(roots)
        # Attributes of plain objects are containers here: their changes are undone.
        self._live = reached.containers | {f"{path} ": attributes for path, (attributes, _) in reached.plain.items()}
        self._containers = {path: _copied(live) for path, live in self._live.items()}
        self._contents = {path: cell.cell_contents for path, cell in reached.cells.items()}
        self._globals = {path: {n: scope[n] for n in names} for path, (scope, names) in reached.names.items()}
        self.tensors = {path: _detached(tensor) for path, tensor in reached.tensors.items()}
        self._gradients = {
            path: (tensor.grad, _detached(tensor.grad))
            for path, tensor in reached.tensors.items()
            if tensor.is_leaf and tensor.grad is not None
        }
        self._arrays = {path: array.copy() for path, array in reached.arrays.items()}
        self._rng = rng
        self.random = _random_states(rng)
        self.random |= {f"the state of {path}": state_of(g) for path, g in reached.generators.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Bring every value back that has changed, and the generators."""
        for path, live in self._live.items():
            kept = self._containers[path]
            if _first_change(live, kept) is _MISSING:
                continue
            if isinstance(live, (list, deque)):
                live.clear()
                live.extend(kept)
            else:
                live.clear()
                live.update(kept)
        for path, cell in self._reached.cells.items():
            if cell.cell_contents is not self._contents[path]:
                cell.cell_contents = self._contents[path]
        for path, (scope, _) in self._reached.names.items():
            for name, value in self._globals[path].items():
                if scope.get(name, _MISSING) is not value:
                    scope[name] = value
        for path, tensor in self._reached.tensors.items():
            _write(tensor, self.tensors[path])
            if tensor.is_leaf:
                tensor.grad = None
                if path in self._gradients:
                    tensor.grad, value = self._gradients[path]
                    _write(tensor.grad, value)
        for path, array in self._reached.arrays.items():
            if array.flags.writeable:
                array[...] = self._arrays[path]
        _set_random_states(self.random, self._rng)
        for path, generator in self._reached.generators.items():
            set_state(generator, self.random[f"the state of {path}"])

    def leaves(self) -> dict[str, Any]:
        """Map each path to the value there: a tensor, an array, or a plain Python value."""
        found: dict[str, Any] = {**self.tensors, **self._arrays}
        found |= {f"{path}.grad": value for path, (_, value) in self._gradients.items()}
        for path, kept in self._containers.items():
            items = kept.items() if isinstance(kept, dict) else enumerate(kept) if not isinstance(kept, set) else ()
            for key, value in items:
                if isinstance(value, _ATOMS) and isinstance(key, _ATOMS):
                    found[_joined(path.strip(), key)] = value
            if not isinstance(kept, dict):
                found[f"len({path})"] = len(kept)
        for path, value in self._contents.items():
            if isinstance(value, _ATOMS):
                found[path] = value
        for values in self._globals.values():
            found |= {name: value for name, value in values.items() if isinstance(value, _ATOMS)}
        return found


def differences(
    got: Snapshot,
    expected: Snapshot,
    start: Snapshot,
    tolerance: float,
    rounding: Mapping[str, float],
    *,
    draws: bool = True,
) -> list[str]:
    """Return the names of values that differ between two runs of a step from one start; empty if none does.

    A tensor may be off by ``tolerance`` times its change since the start, or times its norm if it is new, and by
    ``rounding[path]`` if there is one. An adaptive optimizer's steps on gradients that are rounding noise are not
    compared. A missing state of an optimizer equals one of zeros.
    """
    found = []
    a, b, before = got.leaves(), expected.leaves(), start.leaves()
    noise = _noise(b)
    for path in sorted(a.keys() | b.keys()):
        x, y = a.get(path, _MISSING), b.get(path, _MISSING)
        if x is _MISSING or y is _MISSING:
            value = y if x is _MISSING else x
            zero = value is None or (isinstance(value, (int, float, Tensor)) and not torch.as_tensor(value).any())
            if not (zero and _OF_OPTIMIZER.match(path)):
                found.append(path)
        elif isinstance(x, Tensor) and isinstance(y, Tensor):
            if not _close(x, y, before.get(path), tolerance, noise.get(path), rounding.get(path, 0.0)):
                found.append(path)
        elif isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            if x.shape != y.shape or not np.allclose(x, y, rtol=tolerance, atol=0, equal_nan=True):
                found.append(path)
        elif not _same(x, y):
            found.append(path)
    if draws:
        both = expected.random.keys() & got.random.keys()
        found += [name for name in sorted(both) if not _same_state(got.random[name], expected.random[name])]
    return found


def distances(a: Snapshot, b: Snapshot) -> dict[str, float]:
    """Map each path where both hold a tensor of one shape to the norm of the difference; values not finite count 0."""
    others, found = b.leaves(), {}
    for path, x in a.leaves().items():
        y = others.get(path)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.is_floating_point():
            difference = x.double() - y.to(x.device, torch.float64)
            found[path] = float(torch.where(difference.isfinite(), difference, 0).norm())
    return found


def differing_terms(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> list[str]:
    """Names of the terms of a loss that differ, in relation to the largest of them."""
    if got.keys() != expected.keys():
        return sorted(got.keys() ^ expected.keys())
    largest = max(float(term.abs()) for term in expected.values())
    floor = 8 * max(torch.finfo(term.dtype).eps for term in expected.values())
    return [
        name
        for name, term in expected.items()
        if not torch.isclose(got[name], term, rtol=0, atol=tolerance * largest + floor, equal_nan=True)
    ]


def _noise(leaves: dict[str, Any]) -> dict[str, Tensor]:
    """Map weights, their averages and states of optimizers to the entries whose gradients are rounding noise.

    Such as those of a bias before batch norm: zero but for rounding, which an adaptive optimizer makes full steps of.
    """
    states = {path: found for path in leaves if (found := _OF_OPTIMIZER.fullmatch(path))}
    squares: dict[tuple[str, str], Tensor] = {}
    for path, found in states.items():
        if found[3] in ("exp_avg_sq", "square_avg"):
            squares[found[1], found[2]] = leaves[path].double()
        elif found[3] == "momentum_buffer" and isinstance(leaves[path], Tensor):
            squares.setdefault((found[1], found[2]), leaves[path].double().square())
    largest: dict[str, float] = {}
    for (optimizer, _), square in squares.items():
        if square.numel():
            largest[optimizer] = max(largest.get(optimizer, 0.0), float(square.mean()))
    noise = {}
    for (optimizer, weight), square in squares.items():
        eps = torch.finfo(leaves[weight].dtype).eps if weight in leaves else torch.finfo(torch.float32).eps
        noise[weight] = square <= (1000 * eps) ** 2 * largest.get(optimizer, 0.0)
    by_key = {weight.partition(".")[2]: mask for weight, mask in noise.items()}
    averages = {path: found[1] for path in leaves if (found := _OF_AVERAGE.fullmatch(path))}
    return (
        noise
        | {path: by_key[key] for path, key in averages.items() if key in by_key}
        | {path: noise[found[2]] for path, found in states.items() if found[2] in noise}
    )


def _close(x: Tensor, y: Tensor, start: Any, tolerance: float, noise: Tensor | None, rounding: float) -> bool:
    if x.shape != y.shape or (x.dtype != y.dtype and x.ndim):
        return False
    if x.numel() == 0:
        return True
    if not (x.is_floating_point() or x.is_complex()):
        return torch.equal(x, y)
    wide = torch.complex128 if x.is_complex() else torch.float64
    eps = torch.finfo(y.dtype).eps
    x, y = x.to(y.device, wide), y.to(wide)
    compared = y.isfinite()
    if not torch.equal(x.isfinite(), compared):
        return False
    if noise is not None and noise.shape == y.shape:
        compared = compared & ~noise.to(y.device)
    zero = torch.zeros_like(y)
    x, y = torch.where(compared, x, zero), torch.where(compared, y, zero)
    known = isinstance(start, Tensor) and start.shape == y.shape
    change = torch.where(compared, y - start.to(y.device, wide), zero).norm() if known else y.norm()
    floor = 16 * eps * y.norm() + torch.finfo(torch.float32).tiny
    return bool((x - y).norm() <= tolerance * change + rounding + floor)


def _random_states(rng: torch.Generator | None) -> dict[str, Any]:
    states: dict[str, Any] = {
        "the state of Python's random": random.getstate(),
        "the state of numpy.random": np.random.get_state(legacy=True),  # noqa: NPY002
        "the state of torch's generator": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["the state of the GPU's generator"] = torch.cuda.get_rng_state()
    if rng is not None:
        states["the state of rng"] = rng.get_state()
    return states


def _set_random_states(states: dict[str, Any], rng: torch.Generator | None) -> None:
    random.setstate(states["the state of Python's random"])
    np.random.set_state(states["the state of numpy.random"])  # noqa: NPY002
    torch.set_rng_state(states["the state of torch's generator"])
    if "the state of the GPU's generator" in states:
        torch.cuda.set_rng_state(states["the state of the GPU's generator"])
    if rng is not None:
        rng.set_state(states["the state of rng"])


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_state(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return all(map(_same_state, a, b))
    return np.array_equal(a, b)


def _copied(live: Any) -> Any:
    return next(kind(live) for kind in (dict, list, set, deque) if isinstance(live, kind))


def _first_change(live: Any, kept: Any) -> Any:
    """The key or position of a changed item, None if the number of items has changed, ``_MISSING`` if nothing has."""
    if isinstance(live, (dict, types.MappingProxyType)):
        for key, value in live.items():
            if not _same(value, kept.get(key, _MISSING)):
                return key
        return next((key for key in kept if key not in live), _MISSING)
    if isinstance(live, set):
        return _MISSING if len(live) == len(kept) and all(item in kept for item in live) else None
    if len(live) != len(kept):
        return None
    return next((i for i, (x, y) in enumerate(zip(live, kept, strict=True)) if not _same(x, y)), _MISSING)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or not isinstance(a, (*_ATOMS, tuple, types.MethodType, types.BuiltinFunctionType)):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (isinstance(a, float) and a != a and b != b)


def _detached(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.detach().clone(memory_format=torch.preserve_format)


def _write(tensor: Tensor, value: Tensor) -> None:
    data = tensor.detach()
    if data.shape == value.shape and not torch.equal(data, value):
        data.copy_(value)


def _put(found: dict[str, Any], path: str, value: Any) -> None:
    while path in found:
        path += "'"
    found[path] = value


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]"


def _names_of(code: types.CodeType) -> set[str]:
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return strings.union(code.co_names, *map(_names_of, inner))


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _of_library(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _LIBRARIES
