"""Every Python snippet of the documents runs, in order, in one namespace a document; public names are documented."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from fastgan.training import GAN

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/layers.md", "docs/training.md")
PUBLIC = ("nn", "ops", "metrics", "models", "data", "training", "recipes")
MODULES = ("backend", "linalg", "losses", "reference")


def snippets_of(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    return [textwrap.dedent(s) for s in re.findall(r"^ *```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_snippets_run(document, tmp_path, monkeypatch):
    snippets = snippets_of(document)
    assert len(snippets) >= 3
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "document"}
    for snippet in snippets:
        exec(compile(snippet, document, "exec"), namespace)


def test_every_document_with_snippets_is_tested():
    documents = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("fastgan/*/README.md"),
    ]
    assert {str(d.relative_to(ROOT)) for d in documents if snippets_of(str(d))} == set(DOCUMENTS)


def test_the_readme_has_an_example_for_each_use_of_about_ten_lines():
    lengths = [len([line for line in s.splitlines() if line.strip()]) for s in snippets_of("README.md")]
    assert len(lengths) == 3
    assert max(lengths) <= 12


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "bench/README.md", "fastgan/metrics/README.md"])
def test_links_lead_somewhere(document):
    path = ROOT / document
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def public_objects():
    for name in (*PUBLIC, *MODULES):
        module = importlib.import_module(f"fastgan.{name}")
        names = getattr(module, "__all__", None) or [
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
        ]
        for public in names:
            yield f"fastgan.{name}.{public}", getattr(module, public)


def test_public_names_have_docstrings():
    missing = []
    for name, value in public_objects():
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not inspect.getdoc(value):
            missing.append(name)
        if inspect.isclass(value) and value.__module__.startswith("fastgan"):
            missing += [f"{name}.{member}" for member in undocumented_members(value)]
    assert missing == []


def undocumented_members(value):
    """List a class's own public members without docstrings, but for forward and the members of the GAN protocol."""
    described = {"forward"} | (set(vars(GAN)) if value is not GAN else set())
    members = {k: v for k, v in vars(value).items() if not k.startswith("_") and k not in described}
    functions = {k for k, v in members.items() if callable(v) or isinstance(v, property | classmethod)}
    return sorted(k for k in functions if not inspect.getdoc(getattr(value, k)))


def test_make_targets_that_are_spoken_of_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    spoken = {
        target
        for name in ("README.md", "CONTRIBUTING.md", "bench/README.md", ".ci/run", ".pre-commit-config.yaml")
        for target in re.findall(r"(?:^|`|entry: )make ([a-z][a-z-]*)", (ROOT / name).read_text(), flags=re.MULTILINE)
    }
    assert {"demo", "test", "lint", "docs", "gpu"} <= spoken <= targets
