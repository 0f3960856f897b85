"""Every Python snippet of the documents runs, in order, in one namespace a document; public names are documented."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from fastgan.training import GAN

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/layers.md",
    "docs/training.md",
    "docs/howto/compare_checkpoints.md",
    "docs/howto/convert.md",
    "docs/howto/export.md",
    "docs/howto/gradient_penalty.md",
    "docs/howto/many_gpus.md",
    "docs/tutorials/evaluation.md",
    "docs/tutorials/layers.md",
    "docs/tutorials/train_step.md",
)
PUBLIC = ("nn", "ops", "metrics", "models", "data", "training", "recipes")
MODULES = ("backend", "linalg", "losses", "reference")


def snippets_of(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    return [textwrap.dedent(s) for s in re.findall(r"^ *```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_snippets_run(document, tmp_path, monkeypatch):
    snippets = snippets_of(document)
    assert snippets
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "document"}
    for snippet in snippets:
        exec(compile(snippet, document, "exec"), namespace)


@pytest.mark.parametrize("use", [0, 2], ids=["layers", "evaluation"])
def test_a_snippet_of_the_readme_runs_by_itself(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets_of("README.md")[use], "README.md", "exec"), {"__name__": "document"})


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
    assert max(lengths) <= 10


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def pages() -> list[Path]:
    folders = ("", "bench/", "docs/**/", "fastgan/**/")
    return sorted(path for folder in folders for path in ROOT.glob(f"{folder}*.md"))


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub makes them; included pages count."""
    text = path.read_text()
    included = re.findall(r"^```{include} (\S+)", text, flags=re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    own = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return own.union(*(anchors_of(path.parent / name) for name in included))


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        link = "".join(link)
        if re.match(r"https?:|mailto:", link):
            continue
        link = re.sub(r"^\.\./\.\./actions/(workflows/\w+\.yml)(/badge\.svg)?$", r".github/\1", link)  # GitHub's pages
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            wrong.append(link)
    assert wrong == []


def test_all_environment_variables_are_documented():
    """Names in Python, shell, make and workflows, but for macros of the C++ sources, which stand behind -D."""
    patterns = (
        "*.py",
        "fastgan/**/*.py",
        "bench/**/*.py",
        "bench/*.sh",
        "kernels/**/*.py",
        "tests/**/*.py",
        "Makefile",
    )
    sources = {path for pattern in (*patterns, ".ci/*", ".github/**/*.yml") for path in ROOT.glob(pattern)}
    assert ROOT / "setup.py" in sources
    named = {
        name
        for path in sources - {Path(__file__)}
        for name in re.findall(r"(?<!-D)\bFASTGAN_[A-Z_]*[A-Z]\b(?!\()", path.read_text())
    }
    macros = set(re.findall(r"#\s*(?:define|ifdef|ifndef)\s+(FASTGAN_\w+)", sources_of_the_extension()))
    documented = set(re.findall(r"^\| `(FASTGAN_\w+)`", (ROOT / "docs/environment.md").read_text(), flags=re.MULTILINE))
    assert {"FASTGAN_CUDA", "FASTGAN_OFFLINE"} <= named
    assert named - macros == documented


def sources_of_the_extension() -> str:
    files = [path for folder in ("csrc", "tests/csrc") for path in ROOT.glob(f"{folder}/**/*.*")]
    return "\n".join(path.read_text() for path in files if path.suffix in (".h", ".cpp", ".cu"))


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


def test_make_targets_in_documents_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    spoken = {
        target
        for name in ("README.md", "CONTRIBUTING.md", "bench/README.md", ".ci/run", ".pre-commit-config.yaml")
        for target in re.findall(r"(?:^|`|entry: )make ([a-z][a-z-]*)", (ROOT / name).read_text(), flags=re.MULTILINE)
    }
    assert {"demo", "test", "lint", "docs", "gpu"} <= spoken <= targets
