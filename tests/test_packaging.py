import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastgan import backend

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "csrc", "kernels", "fastgan")
IGNORED = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")


@pytest.fixture
def tree(tmp_path):
    """A copy of the files of a source distribution, without built ones."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=IGNORED)
        elif source.exists():
            shutil.copy(source, target / name)
    (target / "README.md").touch()
    return target


@pytest.fixture
def no_torch(tmp_path):
    """A directory for PYTHONPATH in which importing torch fails."""
    directory = tmp_path / "no_torch"
    directory.mkdir()
    (directory / "torch.py").write_text("raise ImportError('No module named torch')\n")
    return directory


def setup_py(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in an environment whose only build settings are ``environment``."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("FASTGAN_") and k not in ("CUDA_HOME", "CUDA_PATH")
    }
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=tree,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def wheel_names(tree: Path) -> list[str]:
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture
def needs_wheel():
    pytest.importorskip("wheel", reason="building a wheel needs the wheel package")


@pytest.mark.slow
@pytest.mark.usefixtures("needs_wheel")
def test_wheel_without_torch_is_pure_python(tree, no_torch):
    done = setup_py(tree, "bdist_wheel", PYTHONPATH=str(no_torch))
    assert done.returncode == 0, done.stderr
    assert "WARNING: installing without the C++ extension: torch cannot be imported" in done.stderr
    names = wheel_names(tree)
    assert not [name for name in names if name.endswith(".so")]
    for package, folder in (("fastgan", ROOT / "fastgan"), ("fastgan/kernels", ROOT / "kernels")):
        assert {f"{package}/{source.name}" for source in folder.glob("*.py")} <= set(names)
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
@pytest.mark.usefixtures("needs_wheel")
def test_pure_python_wheel_works(tree, no_torch, tmp_path):
    setup_py(tree, "bdist_wheel", PYTHONPATH=str(no_torch))
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = (
        "import torch, fastgan, fastgan.linalg, fastgan.kernels\n"
        "a = torch.eye(3, dtype=torch.float64)\n"
        "assert not fastgan.backend_status()['extension cpu'].available\n"
        "print(fastgan.__file__, fastgan.linalg.trace_sqrt_product(a, 4 * a).item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    path, value = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path)
    assert float(value) == pytest.approx(6, rel=1e-15)


@pytest.fixture
def isolated(tmp_path):
    """A directory for PYTHONPATH that hides installed packages but for the build tools, as pip's isolated builds do."""
    directory = tmp_path / "isolated"
    directory.mkdir()
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        spec = importlib.util.find_spec(name)
        if spec is not None:
            (directory / name).symlink_to(Path(spec.origin).parent)
    hide = "import sys\nsys.path = [path for path in sys.path if 'site-packages' not in path]\n"
    (directory / "sitecustomize.py").write_text(hide)
    return directory


def test_an_isolated_build_uses_the_installed_torch(tree, isolated):
    hidden = subprocess.run([sys.executable, "-c", "import torch"], env={**os.environ, "PYTHONPATH": str(isolated)})
    assert hidden.returncode != 0
    done = setup_py(tree, "--version", PYTHONPATH=str(isolated), FASTGAN_EXTENSION="1", FASTGAN_CUDA="0")
    assert done.returncode == 0, done.stderr


def git(tree: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=tree, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_version_is_that_of_the_tag(tree):
    pytest.importorskip("setuptools_scm", reason="without it the version is the fallback")
    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "first")
    untagged = setup_py(tree, "--version", FASTGAN_EXTENSION="0").stdout.strip()
    assert re.fullmatch(r"0\.1\.0\.dev\d+\+g[0-9a-f]+", untagged)
    git(tree, "tag", "v1.2.3")
    assert setup_py(tree, "--version", FASTGAN_EXTENSION="0").stdout.strip() == "1.2.3"
    git(tree, "commit", "--allow-empty", "-m", "second")
    assert setup_py(tree, "--version", FASTGAN_EXTENSION="0").stdout.startswith("1.2.4.dev1+g")


def test_the_version_without_git_is_that_of_the_source_distribution_or_a_fallback(tree):
    done = setup_py(tree, "--version", FASTGAN_EXTENSION="0")
    assert done.stdout.strip() == "0.1.0.dev0", done.stderr
    pytest.importorskip("setuptools_scm", reason="without it the version is the fallback")
    (tree / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: fastgan\nVersion: 4.5.6\n")
    assert setup_py(tree, "--version", FASTGAN_EXTENSION="0").stdout.strip() == "4.5.6"


@pytest.mark.build
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_cuda_half_that_does_not_compile_leaves_the_cpu_half(tree, tmp_path):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'release {torch.version.cuda}, V0' || exit 1\n")
    nvcc.chmod(0o755)
    script = tree / "setup.py"
    script.write_text(script.read_text().replace('/ "nvidia" /', '/ "none" /'))
    settings = {"CUDA_HOME": str(nvcc.parents[1]), "PATH": f"{nvcc.parent}:/usr/bin:/bin"}
    done = setup_py(tree, "build_ext", "--inplace", **settings)
    assert done.returncode == 0, done.stderr
    if torch.version.cuda is not None:
        assert "WARNING: the CUDA half is left out: building it failed" in done.stderr
    assert "installing without the C++ extension" not in done.stderr
    assert list((tree / "fastgan").glob("_C*"))


@pytest.mark.parametrize("variable", ["FASTGAN_EXTENSION", "FASTGAN_CUDA"])
def test_demanding_the_extension_without_torch_fails(tree, no_torch, variable):
    done = setup_py(tree, "build_ext", "--inplace", PYTHONPATH=str(no_torch), **{variable: "1"})
    assert done.returncode != 0
    assert "torch cannot be imported in the build environment" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variable", ["FASTGAN_EXTENSION", "FASTGAN_CUDA"])
def test_unknown_setting_fails(tree, variable):
    done = setup_py(tree, "--version", **{variable: "yes"})
    assert done.returncode != 0
    assert f"{variable} must be 0, 1 or auto, got 'yes'" in done.stderr


def test_contradicting_settings_fail(tree):
    done = setup_py(tree, "--version", FASTGAN_CUDA="1", FASTGAN_EXTENSION="0")
    assert done.returncode != 0
    assert "FASTGAN_CUDA=1 contradicts FASTGAN_EXTENSION=0" in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
def test_demanding_cuda_without_a_matching_nvcc_says_what_is_missing(tree, tmp_path):
    other = tmp_path / "toolkit"
    (other / "bin").mkdir(parents=True)
    nvcc = other / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.0, V1.0.1'\n")
    nvcc.chmod(0o755)
    script = tree / "setup.py"
    # Out of reach of any toolkit that this machine does have.
    script.write_text(
        script.read_text().replace('"/usr/local/cuda"', '"/nonexistent"').replace('/ "nvidia" /', '/ "none" /')
    )
    done = setup_py(tree, "build_ext", FASTGAN_CUDA="1", CUDA_HOME=str(other), PATH=f"{other / 'bin'}:/usr/bin:/bin")
    assert done.returncode != 0
    assert f"torch was built with CUDA {torch.version.cuda} and needs an nvcc of that version" in done.stderr
    assert f"{nvcc} is 1.0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.build
@pytest.mark.parametrize("ninja", ["with ninja", "without ninja"])
def test_failing_compiler_gives_a_pure_python_installation(tree, tmp_path, ninja):
    source = tree / "csrc" / "cpu.cpp"
    source.write_text("#error this does not compile\n")
    settings = {"FASTGAN_CUDA": "0"}
    if ninja == "without ninja":
        (tmp_path / "blocked").mkdir()
        (tmp_path / "blocked" / "ninja").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "blocked" / "ninja").chmod(0o755)
        settings["PATH"] = f"{tmp_path / 'blocked'}:/usr/bin:/bin"
    optional = setup_py(tree, "build_ext", "--inplace", **settings)
    assert optional.returncode == 0, optional.stderr
    assert "WARNING: installing without the C++ extension: building it failed" in optional.stderr
    assert not list((tree / "fastgan").glob("_C*"))
    demanded = setup_py(tree, "build_ext", "--inplace", FASTGAN_EXTENSION="1", **settings)
    assert demanded.returncode != 0


@pytest.mark.slow
def test_missing_compiler_gives_a_pure_python_installation(tree, tmp_path):
    settings = {"FASTGAN_CUDA": "0", "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = setup_py(tree, "build_ext", "--inplace", **settings)
    assert done.returncode == 0, done.stderr
    assert "WARNING: installing without the C++ extension: building it failed" in done.stderr


@pytest.mark.build
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.usefixtures("needs_wheel")
def test_wheel_with_the_extension(tree):
    done = setup_py(tree, "bdist_wheel", FASTGAN_CUDA="0", FASTGAN_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name  # one wheel for every Python from 3.10 on
    (library,) = (name for name in wheel_names(tree) if name.endswith(".so"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(library, tree)
    program = (
        f"import torch; torch.ops.load_library({str(tree / library)!r}); assert not torch.ops.fastgan_C.has_cuda();"
        "a = torch.eye(3).unsqueeze(0);"
        "print(torch.ops.fastgan_C.small_trace(a, a, torch.zeros(1, 2, dtype=torch.int64))[0, 0].item())"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr
    assert float(loaded.stdout) == pytest.approx(3, rel=1e-6)


@pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")
def test_built_extension_uses_only_the_stable_abi():
    """Any symbol of namespace c10 or at is tied to one release of torch."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    (library, *_) = sorted((ROOT / "fastgan").glob("_C*.so"))
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in symbols)
    assert not [symbol for symbol in symbols if symbol.startswith(("_ZN3c10", "_ZN2at", "_ZNK3c10", "_ZNK2at"))]


@pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")
def test_broken_extension_is_reported_not_raised(tmp_path, monkeypatch):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    reason = backend.load_extension.__wrapped__()
    assert "_C.so does not load" in reason
