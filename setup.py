"""Package layout (kernels/ is installed as fastgan.kernels) and the C++/CUDA extension fastgan/_C.

The extension is built against the LibTorch stable ABI, so one binary loads in every torch >= 2.11 and every Python.
If it cannot be built, the installation is pure Python and works: ``fastgan.backend_status()`` says so.

torch is not a build requirement, since pip would download a second one to build against. An isolated build uses the
torch of the environment that it installs into, and falls back to pure Python if there is none.

Environment:
    FASTGAN_EXTENSION     0: do not build; 1: fail if it cannot be built; auto (default): build if possible.
    FASTGAN_CUDA          0: C++ half only; 1: fail without the CUDA half; auto (default): build the CUDA half if an
                          nvcc of torch's CUDA version is found.
    TORCH_CUDA_ARCH_LIST  GPU architectures, by default "8.0;9.0;10.0+PTX".
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
BLACKWELL_NVCC = (12, 8)  # the first that knows sm_100
KERNEL_PACKAGES = ["fastgan.kernels", *(f"fastgan.kernels.{name}" for name in find_packages("kernels"))]
CPU_SOURCES = [
    f"csrc/{name}.cpp"
    for name in (
        "cpu",
        "attention",
        "projections",
        "spectral_norm",
        "variants",
        "kernels",
        "kernels_avx2",
        "kernels_avx512",
    )
]
CUDA_SOURCES = ["csrc/cuda.cu"]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))  # a change of one is a reason to build again
FALLBACK_VERSION = "0.1.0.dev0"  # of an export without git's history or an sdist's PKG-INFO


class BuildError(SystemExit):
    """An environment variable demands something that cannot be built."""


def version() -> str:
    """Return the version of the last tag, a development version after it, or that of the sdist's PKG-INFO."""
    try:
        from setuptools_scm import get_version
    except ImportError:  # without build isolation, nothing installs the build requirements
        return FALLBACK_VERSION
    return get_version(root=Path(__file__).parent, fallback_version=FALLBACK_VERSION)


def setting(name: str) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in ("0", "1", "auto"):
        raise BuildError(f"{name} must be 0, 1 or auto, got {value!r}")
    return value


def demanded() -> bool:
    return "1" in (setting("FASTGAN_EXTENSION"), setting("FASTGAN_CUDA"))


def give_up(reason: str) -> None:
    """Fail if the extension was demanded; otherwise print what is missing and go on."""
    if demanded():
        raise BuildError(f"fastgan: FASTGAN_EXTENSION=1 or FASTGAN_CUDA=1 is set, but {reason}")
    print(f"fastgan: WARNING: installing without the C++ extension: {reason}", file=sys.stderr, flush=True)


def find_installed_torch() -> None:
    """Put the packages of the environment that is installed into behind those of an isolated build.

    pip hides them by PYTHONPATH alone, which ``python -E`` ignores.
    """
    if importlib.util.find_spec("torch") is None:
        command = [sys.executable, "-E", "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
        paths = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        sys.path += [path for path in paths if path not in sys.path]


def cuda_wheels(cuda_version: str) -> Path:
    """Return the folder of the headers and libraries of the nvidia wheels beside torch; it need not exist."""
    import torch

    return Path(torch.__file__).parents[1] / "nvidia" / f"cu{cuda_version.split('.')[0]}"


def nvcc_release(nvcc: Path) -> str | None:
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else None


def find_cuda_home(cuda_version: str | None) -> tuple[Path | None, str]:
    """Return the root of a toolkit with an nvcc of exactly torch's CUDA version, or None and the reason."""
    if cuda_version is None:
        return None, "torch was built without CUDA"
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [cuda_wheels(cuda_version) / "bin" / "nvcc", *(Path(root) / "bin" / "nvcc" for root in roots if root)]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    others = []
    for nvcc in candidates:
        if nvcc.is_file():
            release = nvcc_release(nvcc)
            if release == cuda_version:
                return nvcc.resolve().parent.parent, ""
            others.append(f"{nvcc} is {release}")
    seen = "; ".join(others) or "there is none on PATH, in CUDA_HOME or in site-packages/nvidia"
    return None, (
        f"torch was built with CUDA {cuda_version} and needs an nvcc of that version: {seen}. "
        f'`pip install "cuda-toolkit[nvcc]=={cuda_version}.*"` provides one'
    )


def architectures(cuda_version: str) -> str:
    release = tuple(int(part) for part in cuda_version.split(".")[:2])
    return "8.0;9.0;10.0+PTX" if release >= BLACKWELL_NVCC else "8.0;9.0+PTX"


def link_directory(wheels: Path) -> list[str]:
    """Link the wheels' libraries (libcudart.so.13) under the names that the linker looks for (libcudart.so)."""
    libraries = [*wheels.glob("lib/lib*.so.*")]
    if not libraries:
        return []
    links = Path("build/cuda-links")
    links.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        link = links / f"{library.name.split('.so')[0]}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    return [str(links.resolve())]


def cpu_extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "fastgan._C",
        CPU_SOURCES,
        depends=HEADERS,
        py_limited_api=True,
        extra_compile_args={"cxx": ["-O3", "-g0", *STABLE_ABI]},
    )


def cuda_extension(home: Path, cuda_version: str) -> Extension:
    from torch.utils import cpp_extension

    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(home)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(cuda_version))
    wheels = cuda_wheels(cuda_version)
    flags = [*STABLE_ABI, "-DUSE_CUDA"]
    return cpp_extension.CUDAExtension(
        "fastgan._C",
        [*CPU_SOURCES, *CUDA_SOURCES],
        depends=HEADERS,
        py_limited_api=True,
        include_dirs=[str(wheels / "include")] if (wheels / "include").is_dir() else [],
        library_dirs=link_directory(wheels),
        libraries=["cublas"],
        extra_compile_args={"cxx": ["-O3", "-g0", *flags], "nvcc": ["-O3", *flags]},
    )


def extensions() -> list[Extension]:
    if setting("FASTGAN_EXTENSION") == "0":
        if setting("FASTGAN_CUDA") == "1":
            raise BuildError("fastgan: FASTGAN_CUDA=1 contradicts FASTGAN_EXTENSION=0")
        return []
    find_installed_torch()
    try:
        import torch
        from torch.utils import cpp_extension  # noqa: F401
    except Exception as error:  # a broken torch must not stop a pure-Python installation
        missing = isinstance(error, ImportError)
        hint = "install it, then build without isolation (`--no-build-isolation` of pip)" if missing else "repair it"
        give_up(f"torch cannot be imported in the build environment ({error}); {hint}")
        return []
    if setting("FASTGAN_CUDA") == "0":
        return [cpu_extension()]
    home, missing = find_cuda_home(torch.version.cuda)
    if home is not None:
        return [cuda_extension(home, torch.version.cuda)]
    if setting("FASTGAN_CUDA") == "1":
        raise BuildError(f"fastgan: FASTGAN_CUDA=1 is set, but {missing}")
    print(f"fastgan: building the C++ half of the extension only: {missing}", file=sys.stderr, flush=True)
    return [cpu_extension()]


def build_command() -> type[build_ext]:
    """torch's build_ext, falling back from CUDA to C++ and from C++ to pure Python unless the half was demanded."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except Exception:
        return build_ext
    base = BuildExtension.with_options(no_python_abi_suffix=True)

    class OptionalBuild(base):  # type: ignore[misc, valid-type]
        def run(self) -> None:
            inplace = self.inplace
            try:
                super().run()
            except (Exception, SystemExit) as error:
                self.inplace = inplace  # setuptools clears it while it builds
                self.retreat(error)

        def retreat(self, error: BaseException) -> None:
            reason = f"building it failed: {str(error).strip().splitlines()[-1] if str(error).strip() else error!r}"
            has_cuda = any(source.endswith(".cu") for extension in self.extensions for source in extension.sources)
            if demanded() and not (has_cuda and setting("FASTGAN_CUDA") == "auto"):
                raise error
            if has_cuda:
                print(f"fastgan: WARNING: the CUDA half is left out: {reason}", file=sys.stderr, flush=True)
                self.extensions = self.distribution.ext_modules = [cpu_extension()]
                self.check_extensions_list(self.extensions)
                self.finalized, self.swig_opts, self.compiler = False, None, None  # as before distutils parsed them
                self.ensure_finalized()
                self.run()
                return
            give_up(reason)
            self.extensions = self.distribution.ext_modules = []

    return OptionalBuild


ext_modules = extensions()
setup(
    version=version(),
    packages=[*find_packages(include=["fastgan", "fastgan.*"]), *KERNEL_PACKAGES],
    package_dir={"fastgan.kernels": "kernels"},
    package_data={"fastgan": ["py.typed", "recipes/*.yaml"]},
    ext_modules=ext_modules,
    cmdclass={"build_ext": build_command()} if ext_modules else {},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
