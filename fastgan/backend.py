"""Find out which implementations this machine can run, and choose between them.

Every public function takes ``impl="auto" | "triton" | "extension" | "reference"``. ``auto`` means the Triton kernel for
CUDA tensors of a dtype it supports, the C++ extension for CPU tensors, and plain PyTorch otherwise. A missing backend
costs one warning, never a retry per call.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

IMPLS = ("auto", "triton", "extension", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The interface_version() of csrc/cpu.cpp that this code calls; an extension with another one is not used.
EXTENSION_INTERFACE = 3

# Sentences on kernels that the installed Triton spills; launchers append to it.
SPILLED: list[str] = []


class BackendWarning(UserWarning):
    """A faster backend is missing; the result is the same, the time is not."""


@dataclass(frozen=True)
class Backend:
    """One row of :func:`backend_status`: ``detail`` is a version, or the reason why ``available`` is False."""

    name: str
    available: bool
    detail: str


@dataclass(frozen=True)
class BackendStatus:
    """The result of :func:`backend_status`; prints as a table and is indexed by name."""

    backends: tuple[Backend, ...]

    def __getitem__(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise KeyError(f"no backend {name!r}; there are {', '.join(b.name for b in self.backends)}")

    def __iter__(self) -> Iterator[Backend]:
        return iter(self.backends)

    def __str__(self) -> str:
        width = max(len(b.name) for b in self.backends)
        return "\n".join(f"{b.name:<{width}}  {'yes' if b.available else 'no ':<3}  {b.detail}" for b in self.backends)


def backend_status() -> BackendStatus:
    """Report torch, Triton, its interpreter, the GPU and both halves of the C++/CUDA extension.

    Example:
        >>> backend_status()["torch"].available
        True
    """
    triton = _triton()
    interpreter = "is set: kernels run on the CPU, slowly" if interpreting() else "not set"
    return BackendStatus(
        (
            Backend("torch", True, f"{torch.__version__} (python {platform.python_version()})"),
            replace(triton, detail="; ".join([triton.detail, *SPILLED])),
            Backend("interpreter", interpreting(), f"TRITON_INTERPRET {interpreter}"),
            _gpu(),
            _extension("cpu"),
            _extension("cuda"),
        )
    )


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def device_name(device: str) -> str:
    """Return the GPU's name for ``cuda``, else the number of torch's threads and the CPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} thread{'' if threads == 1 else 's'} of {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def _called_when_traced(function: F) -> F:
    """Make Dynamo call ``function`` and not trace it.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_called_when_traced
def _triton_missing() -> str:
    """Return the reason why Triton cannot be used, or "" if it can."""
    triton = _triton()
    return "" if triton.available else triton.detail


@_called_when_traced
def _extension_missing() -> str:
    """Return the reason why the extension's CPU half cannot be used, or ""."""
    return extension_missing()


@functools.cache
def _triton() -> Backend:
    try:
        import triton
    except Exception as error:  # a broken installation must not take the reference path with it
        return Backend("triton", False, f"import triton failed: {error}")
    return Backend("triton", True, triton.__version__)


def _gpu() -> Backend:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return Backend("gpu", True, f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})")
    if torch.version.cuda is None:
        return Backend("gpu", False, "torch was built without CUDA")
    return Backend("gpu", False, "no CUDA device is visible")


@functools.cache
def load_extension() -> str:
    """Load the C++/CUDA extension ``fastgan/_C*.so``; return "" on success, else the reason why it is missing."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return "not built: `pip install .` builds it in an environment with torch and a C++ compiler"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"{found[0].name} does not load: {error}"
    operators = torch.ops.fastgan_C
    built = operators.interface_version() if hasattr(operators, "interface_version") else "unknown"
    if built != EXTENSION_INTERFACE:
        return (
            f"{found[0].name} was built from other sources than this Python code (interface {built}, "
            f"expected {EXTENSION_INTERFACE}); rebuild it: pip install -e . --no-build-isolation"
        )
    return ""


def extension_missing(device_type: str = "cpu") -> str:
    """Return why the extension's half for ``device_type`` ("cpu" or "cuda") cannot be used; "" if it can."""
    reason = load_extension()
    if not reason and device_type == "cuda" and not torch.ops.fastgan_C.has_cuda():
        return "built without CUDA: no nvcc of torch's CUDA version was found (FASTGAN_CUDA=1 demands one)"
    return reason


@_called_when_traced
def extension_available(device_type: str = "cpu") -> bool:
    """Return whether the extension's half for ``device_type`` is loaded. The first no warns once."""
    missing = extension_missing(device_type)
    if missing:
        warn_once(f"fastgan runs its Python path in place of the C++ extension ({device_type}): {missing}")
    return not missing


def release_memory() -> int:
    """Return memory that the C++ extension holds for its next outputs on a CPU, and how many bytes that was.

    Large normalized weights, their gradients and workspaces take the memory of earlier ones that nothing uses any more:
    the system takes longer to hand out new memory than the weights take to be computed. At most
    ``FASTGAN_CPU_CACHE_MB`` megabytes (1024 by default; 0 for none) are held.

    Example:
        >>> release_memory() >= 0
        True
    """
    return 0 if load_extension() else int(torch.ops.fastgan_C.release_memory())


def _extension(device_type: str) -> Backend:
    missing = extension_missing(device_type)
    idle = device_type == "cuda" and not torch.cuda.is_available()
    loaded = (
        f"loaded, {torch.ops.fastgan_C.vector_bits()}-bit vectors" if device_type == "cpu" and not missing else "loaded"
    )
    detail = missing or ("built, with no CUDA device to run on" if idle else loaded)
    return Backend(f"extension {device_type}", not missing, detail)


@_called_when_traced
def warn_once(message: str) -> None:
    """Issue ``message`` as a :class:`BackendWarning`, once in the life of the process."""
    warn_anew(message)


@functools.cache
def warn_anew(message: str) -> None:
    """Warn, and remember it for :func:`warn_once`; ``cache_clear`` forgets all messages."""
    warnings.warn(message, BackendWarning, stacklevel=4)


def check_impl(impl: str) -> None:
    """Raise ``ValueError`` unless ``impl`` is one of :data:`IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def resolve(impl: str, tensor: Tensor) -> str:
    """Turn ``impl`` into ``"triton"``, ``"extension"`` or ``"reference"`` for operands like ``tensor``.

    Raises:
        ValueError: ``impl`` is unknown, or is ``"triton"`` or ``"extension"`` and cannot run on this tensor.
    """
    check_impl(impl)
    if impl == "reference":
        return "reference"
    if impl == "extension":
        if tensor.device.type != "cpu":
            raise ValueError(f"impl='extension' needs CPU tensors, got {tensor.device}")
        if _extension_missing():
            raise ValueError(f"impl='extension' cannot be used: {_extension_missing()}")
        return "extension"
    if impl == "auto" and tensor.device.type == "cpu":
        return "extension" if extension_available() else "reference"
    supported = tensor.dtype in KERNEL_DTYPES
    runnable = tensor.is_cuda or interpreting()
    if impl == "triton":
        if _triton_missing():
            raise ValueError(f"impl='triton' cannot be used: {_triton_missing()}")
        if not supported:
            raise ValueError(f"impl='triton' supports float32, bfloat16 and float16, got {tensor.dtype}")
        if not runnable:
            raise ValueError(f"impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {tensor.device}")
        return "triton"
    if not tensor.is_cuda or not supported:
        return "reference"
    if _triton_missing():
        warn_once(f"fastgan runs its reference path on the GPU: {_triton_missing()}")
        return "reference"
    return "triton"


# Launchers of kernels, imported at their first use, since Triton may be missing.
_LAUNCHERS = {
    "attention": "attention.launch",
    "multihead": "attention.multihead",
    "projections": "projections",
    "spectral_norm": "spectral_norm.launch",
}


@functools.cache
def implementation(op: str, impl: str) -> ModuleType:
    """Return the module that computes ``op`` by the ``impl`` that :func:`resolve` chose.

    It holds launchers of kernels, callers of the extension or plain PyTorch.
    """
    return importlib.import_module(f"fastgan.kernels.{_LAUNCHERS[op]}" if impl == "triton" else f"fastgan.{impl}.{op}")
