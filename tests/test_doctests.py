"""Examples in docstrings run. They may use torch, ``nn`` and every public name of fastgan without importing them."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import fastgan

PACKAGES = ("nn", "ops", "linalg", "metrics", "models", "losses", "data", "training", "recipes", "bench")
SKIPPED = ("fastgan.cli", "fastgan.__main__", "fastgan.kernels")


def public_names():
    return {
        name: value
        for package in PACKAGES
        for name, value in vars(importlib.import_module(f"fastgan.{package}")).items()
        if name in importlib.import_module(f"fastgan.{package}").__all__
    }


def modules():
    names = [info.name for info in pkgutil.walk_packages(fastgan.__path__, "fastgan.")]
    return ["fastgan", *(name for name in names if not name.startswith((*SKIPPED, "fastgan._C")))]


@pytest.mark.parametrize("name", modules())
def test_examples_run(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module, name) if test.examples]
    runner = doctest.DocTestRunner()
    for i, test in enumerate(tests):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.chdir(folder)
        torch.manual_seed(0)
        test.globs = public_names() | vars(module) | {"torch": torch, "nn": nn, "__name__": "example"}
        runner.run(test)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_example(package):
    module = importlib.import_module(f"fastgan.{package}")
    without = [
        name
        for name in module.__all__
        for value in [getattr(module, name)]
        if (inspect.isclass(value) or inspect.isroutine(value)) and not exception(value)
        if str(value.__module__).startswith("fastgan") and ">>>" not in (value.__doc__ or "")
    ]
    assert without == []


def exception(value):
    return inspect.isclass(value) and issubclass(value, Exception)
