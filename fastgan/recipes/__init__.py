"""Recipes: one YAML file a system, read into the dataclasses of :mod:`fastgan.recipes.schema`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from fastgan.recipes.schema import ModelConfig, Recipe, TrainConfig

__all__ = ["ModelConfig", "Recipe", "TrainConfig", "available", "load_recipe", "parse_recipe"]

T = TypeVar("T")


def available() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe by its name (one of :func:`available`) or from a YAML file of one's own.

    Raises:
        ValueError: there is no such recipe, or it has an unknown key or a value of the wrong type or range.
    """
    import yaml

    if isinstance(recipe, str) and recipe in available():
        text = resources.files(__package__).joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    elif Path(recipe).is_file():
        text = Path(recipe).read_text(encoding="utf-8")
    else:
        raise ValueError(f"recipe must be one of {', '.join(available())} or a YAML file, got {str(recipe)!r}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {recipe} is not valid YAML: {error}") from error
    return parse_recipe(content)


def parse_recipe(content: object) -> Recipe:
    """Build a :class:`Recipe` from nested mappings; see :func:`load_recipe` for what is raised."""
    return _build(Recipe, content, "recipe")


def _build(cls: type[T], content: object, where: str) -> T:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(content).__name__}")
    types = typing.get_type_hints(cls)
    for key in content:
        if key not in types:
            raise ValueError(f"{where} has no key {key!r}; there are {', '.join(types)}")
    required = [f.name for f in dataclasses.fields(cls) if _is_required(f)]  # type: ignore[arg-type]
    for key in required:
        if key not in content:
            raise ValueError(f"{where} needs the key {key!r}")
    return cls(**{key: _convert(value, types[key], f"{where}.{key}") for key, value in content.items()})


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(value: object, to: Any, where: str) -> Any:
    if dataclasses.is_dataclass(to):
        return _build(typing.cast(type, to), value, where)
    if typing.get_origin(to) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        item = typing.get_args(to)[0]
        return tuple(_convert(v, item, where) for v in value)
    if to is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, to) or (isinstance(value, bool) and to is not bool):
        raise ValueError(f"{where} must be of type {to.__name__}, got {value!r}")
    return value
