"""Launch kernels: on the device of their operands, and with a smaller tile if this Triton spills the usual one.

The tiles in the tables compile without local memory in their loops under the releases of Triton that are tested. For
any other, the first launch of each specialization inspects the compiled kernel.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastgan.backend import SPILLED
from fastgan.kernels.machine_code import MOST_LOCAL, local_memory_in_loops

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


class Configuration(Protocol):
    """One way to launch a kernel: a frozen dataclass, whose text is the size of a tile."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...

    def constants(self) -> dict[str, int]:
        """Return the kernel's ``constexpr`` arguments that give the size of a tile."""

    def smaller(self: C) -> C | None:
        """Return a configuration that takes fewer registers, or None if there is none."""


C = TypeVar("C", bound=Configuration)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what :func:`launch` gives to Triton."""

    kernel: Any
    config: Configuration
    grid: tuple[int, ...]
    arguments: Sequence[Any]
    constants: dict[str, Any]


_seen: set[Any] = set()  # compiled kernels that were looked at
_instead: dict[Any, dict[Hashable, Any]] = {}  # by kernel and specialization: the configuration to use
_record: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches of this block in place of making them. What they would write stays unset."""
    global _record
    _record = []
    try:
        yield _record
    finally:
        _record = None


def launch(
    kernel: Any, given: C, grid: Callable[[C], tuple[int, ...]], arguments: Sequence[Any], **constants: Any
) -> None:
    """Launch ``kernel`` in the ``given`` configuration, or in a smaller one if the compiled kernel spills in a loop.

    The first launch that spills is repeated in smaller configurations until one does not, and all later ones take that
    at once: a graph that is captured then holds compiled code alone. So a kernel that has smaller configurations must
    give the same results when it is launched again.
    """

    def run(config: C) -> Any:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return kernel[grid(config)](*arguments, **config.constants(), **constants, **options)

    if _record is not None:
        _record.append(Launch(kernel, given, grid(given), arguments, {**given.constants(), **constants}))
        return
    config, others = given, _instead.get(kernel)
    if others:
        config = others.get(_specialization(given, arguments, constants), given)
    compiled = run(config)
    if compiled is None or compiled in _seen:  # Triton's interpreter compiles nothing
        return
    _seen.add(compiled)
    if not _spills_in_a_loop(compiled):
        return
    smaller = config.smaller()
    while smaller is not None:
        compiled = run(smaller)
        _seen.add(compiled)
        if not _spills_in_a_loop(compiled):
            _instead.setdefault(kernel, {})[_specialization(given, arguments, constants)] = smaller
            break
        smaller = smaller.smaller()
    if smaller is None and config.smaller() is not None:
        run(config)  # as later launches will, so that all results are the same
    outcome = "and at all smaller tiles" if smaller is None else f"and runs at {smaller}"
    note = f"{kernel.__name__} spills in a loop at {config} {outcome}"
    if note not in SPILLED:
        SPILLED.append(note)


def _spills_in_a_loop(compiled: Any) -> bool:
    local = 4 * compiled.n_spills  # Triton counts words
    if not local or "cubin" not in compiled.asm:
        return False
    try:
        return local_memory_in_loops(compiled.asm["cubin"]) > 0
    except (OSError, subprocess.CalledProcessError):  # this Triton ships no disassembler that runs here
        return local > MOST_LOCAL


def _specialization(given: Configuration, arguments: Sequence[Any], constants: dict[str, Any]) -> Hashable:
    """Return what Triton compiles apart: device, dtypes, divisibility by 16, ones, integers that need 64 bits."""
    return given, *map(_kind, arguments), *constants.items()


def _kind(x: Any) -> Hashable:
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.dtype, x.get_device(), x.data_ptr() % 16 == 0
    if isinstance(x, tuple):
        return tuple(map(_kind, x))
    return type(x), x == 1, x % 16 == 0, abs(x) >= 1 << 31


def on_its_device(launcher: Launcher) -> Launcher:
    """Make the device of the first argument, a tensor or a list of tensors, current: Triton launches on that one."""

    @functools.wraps(launcher)
    def on_device(first: Any, *args: Any, **kwargs: Any) -> Any:
        tensor: Tensor = first if isinstance(first, Tensor) else first[0]
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return launcher(first, *args, **kwargs)
        return launcher(first, *args, **kwargs)

    return on_device  # type: ignore[return-value]
