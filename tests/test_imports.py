"""The structure of the package, read from its source: which module imports which, deferred imports included."""

import ast
import importlib
import inspect
import pkgutil
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import fastgan

ROOT = Path(__file__).parents[1]

GROUND = {"_checks", "_dispatch", "_files", "_layout", "_progress", "_random_state", "backend", "distributed"}
ALLOWED = {
    "_checks": set(),
    "_dispatch": set(),
    "_files": {"_checks"},
    "_layout": set(),
    "_progress": set(),
    "_random_state": set(),
    "_twice_differentiable": set(),
    "backend": set(),
    "distributed": {"_checks"},
    "reference": {"_dispatch", "_layout"},
    "kernels": {"_layout", "backend"},
    "extension": {"_layout", "backend", "reference"},
    "ops": GROUND | {"reference", "kernels", "extension"},
    "nn": GROUND | {"reference", "ops"},
    "linalg": GROUND,
    "losses": GROUND | {"_twice_differentiable"},
    "data": GROUND,
    "models": GROUND | {"nn"},
    "recipes": GROUND | {"losses", "models"},
    "metrics": GROUND | {"linalg", "data"},
    "training": GROUND | {"_twice_differentiable", "losses", "data", "models", "recipes", "metrics"},
    "bench": GROUND | {"reference", "ops", "nn", "linalg", "models"},
}
"""Packages that each package of fastgan may import, besides itself and the version; ``cli``, ``demo``: anything."""


def source_files():
    """Map each module's name to its file; kernels/ is installed as fastgan.kernels."""
    files = {}
    for folder, prefix in (
        ("fastgan", "fastgan"),
        ("kernels", "fastgan.kernels"),
        ("bench", "bench"),
        ("tests", "tests"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fastgan" and parts[0] == "kernels":  # a link that some editable installations make
                continue
            files[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return files


FILES = source_files()
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}


def imported_names(path):
    """Yield (module, name or None) for every import statement in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not used"
            yield from ((node.module, alias.name) for alias in node.names)


def import_graph():
    """Map each module to those it imports, with the packages on the way to them; not its own packages, which Python
    has begun to import before it."""
    graph = defaultdict(set)
    for module, path in FILES.items():
        for name, member in imported_names(path):
            target = f"{name}.{member}" if f"{name}.{member}" in FILES else name
            graph[module] |= {target} & FILES.keys()
            parents = target.split(".")
            packages = {".".join(parents[:i]) for i in range(2, len(parents))} & PACKAGES
            graph[module] |= {package for package in packages if not module.startswith(f"{package}.")}
        graph[module].discard(module)
    return graph


GRAPH = import_graph()


def package_of(module):
    return module.split(".")[1] if module.count(".") else ""


def test_the_graph_sees_imports_of_every_kind(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    from g import h\n")
    assert set(imported_names(path)) == {("a.b", None), ("c", "d"), ("e", None), ("g", "h")}
    assert "fastgan.ops" in GRAPH["fastgan.nn.attention"]
    assert sum(map(len, GRAPH.values())) > 300


def test_no_import_circles():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_imports_point_one_way():
    wrong = [
        f"{module} imports {target}"
        for module in sorted(GRAPH)
        if module.startswith("fastgan.") and package_of(module) in ALLOWED
        for target in sorted(GRAPH[module] - {"fastgan"})
        if not target.startswith("fastgan.")
        or package_of(target) not in ALLOWED[package_of(module)] | {package_of(module)}
    ]
    assert not wrong, "\n".join(wrong)
    packages = {package_of(module) for module in FILES if module.startswith("fastgan.")}
    assert packages == ALLOWED.keys() | {"__main__", "cli", "demo"}


def test_private_names_stay_in_their_package():
    wrong = [
        f"{module} imports {name}.{member}"
        for module, path in FILES.items()
        if module.startswith("fastgan")
        for name, member in imported_names(path)
        if name.startswith("fastgan") and (member or "").startswith("_") and not member.startswith("__")
        if f"{name}.{member}" not in FILES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_name_is_both_a_module_and_something_else():
    for package in sorted(PACKAGES):
        if not package.startswith("fastgan"):
            continue
        if package.startswith("fastgan.kernels"):
            pytest.importorskip("triton")
        module = importlib.import_module(package)
        for found in pkgutil.iter_modules(module.__path__):
            value = getattr(module, found.name, None)
            assert value is None or isinstance(value, ModuleType), f"{package}.{found.name} is a module and {value}"
        for name in getattr(module, "__all__", ()):
            assert not inspect.ismodule(getattr(module, name)), f"{package}.{name} is a module"


def test_tests_mirror_the_package():
    for module in FILES:
        parts = module.split(".")
        if parts[0] != "tests" or not parts[-1].startswith("test_"):
            continue
        folder = ".".join(["fastgan", *parts[1:-1]])
        assert folder in PACKAGES or parts[1:-1] in ([], ["csrc"]), f"{module}: there is no package {folder}"


def test_no_test_module_imports_another():
    wrong = [
        f"{module} imports {target}"
        for module in sorted(GRAPH)
        for target in sorted(GRAPH[module])
        if module.startswith("tests.") and target.rpartition(".")[2].startswith("test_")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("old", sorted(fastgan._MOVED))
def test_a_module_that_moved_names_its_new_place(old):
    new = fastgan._MOVED[old].partition(" ")[0]
    assert old not in FILES
    importlib.import_module(new)
    with pytest.raises(ImportError, match=f"{old} is now {new}"):
        importlib.import_module(old)
    package, _, name = old.rpartition(".")
    with pytest.raises(ImportError, match=f"{old} is now {new}"):
        exec(f"from {package} import {name}", {})
