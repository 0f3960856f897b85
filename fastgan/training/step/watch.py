"""A captured graph holds the Python values that it was traced with: notice when one of them changes."""

from __future__ import annotations

import types
from operator import itemgetter
from typing import Any

from fastgan.training.step.reachable import MISSING, Reachable, copied, first_change, joined, same


class Watch:
    """Checks, by a few comparisons mostly in C, whether a Python value that a graph may hold has changed."""

    def __init__(self, roots: dict[str, Any]) -> None:
        reached = Reachable(roots)
        # A buffer that forward puts in another's place is state, not a constant: see capture.Fit.
        self._paths = [path for path in reached.containers if not path.endswith("._buffers")]
        self._live = [reached.containers[path] for path in self._paths]
        self._kept = [copied(live) for live in self._live]
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
            if (key := first_change(live, kept)) is not MISSING:
                return joined(path, key) if isinstance(live, (dict, types.MappingProxyType)) else path
        for (path, cell), content in zip(self._cells, self._contents, strict=True):
            if not same(cell.cell_contents, content):
                return path
        for (scope, _, names), kept in zip(self._scopes, self._globals, strict=True):
            for name, value in zip(names, kept[1:], strict=True):
                if not same(scope.get(name, MISSING), value):
                    return name
        for keys, absent in self._absent:
            for name in absent & keys:
                return name
        for (path, array), content in zip(self._arrays, self._bytes, strict=True):
            if array.tobytes() != content:
                return path
        return None
