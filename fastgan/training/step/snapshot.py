"""Keep everything that a train step can see, restore it after a trial, and compare the results of two trials."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan._random_state import set_state, state_of
from fastgan.training.step.reachable import ATOMS, MISSING, Reachable, copied, first_change, joined, same

_OF_OPTIMIZER = re.compile(r"(optimizer(?:\.\w+)?)\.state\[(.+)\]\.(\w+)")
_OF_AVERAGE = re.compile(r"ema(?:\.\w+)?\.module\.(.+)")


class Snapshot:
    """Values of everything that can be reached from ``roots``, of gradients, and of all random number generators."""

    def __init__(self, roots: dict[str, Any], rng: torch.Generator | None = None) -> None:
        self._reached = reached = Reachable(roots)
        # Attributes of plain objects are containers here: their changes are undone.
        self._live = reached.containers | {f"{path} ": attributes for path, (attributes, _) in reached.plain.items()}
        self._containers = {path: copied(live) for path, live in self._live.items()}
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
            if first_change(live, kept) is MISSING:
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
                if scope.get(name, MISSING) is not value:
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
                if isinstance(value, ATOMS) and isinstance(key, ATOMS):
                    found[joined(path.strip(), key)] = value
            if not isinstance(kept, dict):
                found[f"len({path})"] = len(kept)
        for path, value in self._contents.items():
            if isinstance(value, ATOMS):
                found[path] = value
        for values in self._globals.values():
            found |= {name: value for name, value in values.items() if isinstance(value, ATOMS)}
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
        x, y = a.get(path, MISSING), b.get(path, MISSING)
        if x is MISSING or y is MISSING:
            value = y if x is MISSING else x
            zero = value is None or (isinstance(value, (int, float, Tensor)) and not torch.as_tensor(value).any())
            if not (zero and _OF_OPTIMIZER.match(path)):
                found.append(path)
        elif isinstance(x, Tensor) and isinstance(y, Tensor):
            if not _close(x, y, before.get(path), tolerance, noise.get(path), rounding.get(path, 0.0)):
                found.append(path)
        elif isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            if x.shape != y.shape or not np.allclose(x, y, rtol=tolerance, atol=0, equal_nan=True):
                found.append(path)
        elif not same(x, y):
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
    largest = max((float(term.abs()) for term in expected.values() if term.isfinite()), default=0.0)
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


def _detached(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.detach().clone(memory_format=torch.preserve_format)


def _write(tensor: Tensor, value: Tensor) -> None:
    data = tensor.detach()
    if data.shape == value.shape and not torch.equal(data, value):
        data.copy_(value)
