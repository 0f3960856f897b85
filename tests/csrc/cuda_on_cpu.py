"""Build the CUDA half of the extension for a CPU: ``python -m tests.csrc.cuda_on_cpu`` builds and checks it.

The sources are translated into C++ (launches become calls), compiled against the small CUDA and cuBLAS of
``emulation/``, and registered for CPU tensors as ``torch.ops.fastgan_emulated``. x86-64 Linux with g++ alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"
CHECKS = Path(__file__).parent / "emulated_checks.py"
ADDRESS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREAD = ("-O1", "-fsanitize=thread")
RACES = ("--operators", "small_trace", "--dims", "3,5")
"""Checks under ThreadSanitizer, which is slow to make fibers: only the kernel whose threads work together."""

_TORCH = Path(torch.__file__).parent


def missing() -> str:
    """Return why nothing can be built here; "" if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the fibers are written for x86-64 Linux, not {platform.machine()} {platform.system()}"
    return "" if shutil.which("g++") else "needs g++"


def runtime(sanitizer: str) -> Path | None:
    """Return the library of "asan" or "tsan", which Python must load first; None if this g++ has none."""
    found = subprocess.run(
        ["g++", f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True
    ).stdout.strip()
    return Path(found).resolve() if os.path.isabs(found) else None


def build(flags: tuple[str, ...] = ("-O1",), change: Callable[[str], str] = lambda source: source) -> Path:
    """Return the library built with ``flags``; the same text is not compiled again.

    Args:
        flags: of the kernels; the scheduler of the fibers is not instrumented.
        change: applied to each .cu file, e.g. to plant a fault.
    """
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    sources = {path.stem: translate(change(path.read_text())) for path in sorted((ROOT / "csrc").glob("*.cu"))}
    sources["operators"] = _operators()
    names = ("aoti_torch_get_current_cuda_stream", "torch_get_current_cuda_blas_handle")
    options = [
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-isystem", str(_TORCH / "include")),
        *(f"-D{name}=emulated_{name}" for name in names),
        *flags,
    ]
    sanitizers = [name for name in ("ADDRESS", "THREAD") if any(name.lower() in flag for flag in flags)]
    jobs = [(name, text, options) for name, text in sources.items()]
    jobs.append(
        ("emulation", (EMULATION / "emulation.cpp").read_text(), ["-O2", *(f"-DEMULATED_{n}" for n in sanitizers)])
    )
    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds at a time
        objects = list(pool.map(lambda job: _object(folder, *job), jobs))
        library = folder / f"emulated-{_digest(objects)}.so"
        libraries = [f"-L{_TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{_TORCH / 'lib'}"]
        _make(library, ["g++", "-shared", *flags, *map(str, objects), *libraries])
    return library


def _object(folder: Path, name: str, source: str, options: list[str]) -> Path:
    """Return the object file of a source text."""
    headers = [path for where in (ROOT / "csrc", EMULATION) for path in sorted(where.glob("*.*h"))]
    key = _digest([source, options, torch.__version__, *(path.read_text() for path in headers)])
    text = folder / f"{name}-{key}.cpp"
    text.write_text(source)
    command = ["g++", "-std=c++20", "-fPIC", "-g", f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", *options, "-c", str(text)]
    return _make(text.with_suffix(".o"), command)


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _make(target: Path, command: list[str]) -> Path:
    """Let ``command`` write ``target``, whole or not at all, unless it is there."""
    if not target.exists():
        unfinished = target.with_suffix(".part")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        unfinished.rename(target)
    return target


def _operators() -> str:
    """Return a source that defines the extension's operators and stands in for torch's stream and cuBLAS handles."""
    schemas = [
        s
        for path in sorted((ROOT / "csrc").glob("*.cpp"))
        for s in re.findall(r'm\.def\(\s*("[^;]*")\)', path.read_text())
    ]
    definitions = "\n".join(f"  m.def({schema});" for schema in schemas)
    return f"""
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY(fastgan_emulated, m) {{
{definitions}
}}
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {{ *stream = nullptr; return 0; }}
extern "C" AOTITorchError torch_get_current_cuda_blas_handle(void** handle) {{ *handle = nullptr; return 0; }}
"""


def translate(source: str) -> str:
    """Turn a .cu file into C++ for ``emulation/cuda_runtime.h``, with its operators for CPU tensors."""
    while found := re.search(r"([A-Za-z_]\w*(?:<\w+>)?)<<<", source):
        end = source.index(">>>", found.end())
        grid, block, shared = [*_arguments(source[found.end() : end]), "0"][:3]
        close = _closing(source, end + 3)
        call = f"{found[1]}{source[end + 3 : close + 1]}"
        launch = f"emulated::run(dim3({grid}), dim3({block}), {shared}, [&] {{ {call}; }})"
        source = source[: found.start()] + launch + source[close + 1 :]
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = static_cast<\1*>(emulated::dynamic_shared());", source
    )
    source = re.sub(
        r"__shared__ (\w+) (\w+)((?:\[[^;]*\])+);",
        r"static char \2_key; using \2_type = \1\3; "
        r"auto& \2 = *static_cast<\2_type*>(emulated::static_shared(&\2_key, sizeof(\2_type)));",
        source,
    )
    source = source.replace(
        "STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(fastgan_emulated, CPU, m)"
    )
    return source.replace("torch::stable::accelerator::DeviceGuard", "emulated::DeviceGuard")


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError("a parenthesis is not closed")


def _arguments(text: str) -> list[str]:
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "(<[{") - (c in ")>]}")
        if c == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    return [*parts, text[last:]]


def check(
    library: Path, *arguments: str, sanitizer: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``emulated_checks.py`` on a library in a process of its own, which a sanitizer may end."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    if sanitizer:
        preloaded = runtime(sanitizer)
        assert preloaded is not None
        settings |= {"LD_PRELOAD": str(preloaded), "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [sys.executable, str(CHECKS), str(library), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=600)


def main() -> int:
    """Check the CUDA half under both sanitizers; the status is 1 if anything is wrong."""
    reason = missing()
    if reason:
        print(f"the CUDA half on a CPU: left out, {reason}")
        return 0
    status = 0
    for sanitizer, flags, chosen in (("asan", ADDRESS, ()), ("tsan", THREAD, RACES)):
        if runtime(sanitizer) is None:
            print(f"the CUDA half under {sanitizer}: left out, this g++ lacks it")
            continue
        done = check(build(flags), *chosen, sanitizer=sanitizer)
        print(done.stdout, done.stderr, sep="", end="")
        print(f"the CUDA half under {sanitizer}: {'failed' if done.returncode else 'clean'}")
        status |= int(done.returncode != 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
