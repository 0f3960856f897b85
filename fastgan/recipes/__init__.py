"""Recipes: one YAML file a system, read into the dataclasses of :mod:`fastgan.recipes.schema`."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from fastgan._checks import InputError
from fastgan.recipes.schema import DataConfig, LogConfig, ModelConfig, Recipe, TrainConfig

__all__ = [
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "Recipe",
    "TrainConfig",
    "available",
    "differences",
    "dump_recipe",
    "load_recipe",
    "override",
    "parse_recipe",
]

T = TypeVar("T")


def available() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe by its name (one of :func:`available`) or from a YAML file of one's own.

    Raises:
        InputError: there is no such recipe, or it has an unknown key or a value of the wrong type or range.
    """
    import yaml

    if isinstance(recipe, str) and recipe in available():
        text = resources.files(__package__).joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    elif Path(recipe).is_file():
        text = Path(recipe).read_text(encoding="utf-8")
    else:
        raise InputError(
            f"recipe must be one of {', '.join(available())} or a YAML file, got {str(recipe)!r}"
            f"{_suggestion(str(recipe), available())}"
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {recipe} is not valid YAML: {error}") from error
    return parse_recipe(content)


def parse_recipe(content: object) -> Recipe:
    """Build a :class:`Recipe` from nested mappings; see :func:`load_recipe` for what is raised."""
    return _build(Recipe, content, "recipe")


def dump_recipe(recipe: Recipe) -> str:
    """YAML that :func:`parse_recipe` turns into an equal recipe, every key written out."""
    import yaml

    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False)


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """``recipe`` with ``key=value`` assignments applied; values are YAML.

    A key is dotted (``train.steps``), or a field's name alone (``steps``) where only one section has it.

    Raises:
        InputError: an assignment has no "=", its key is unknown or ambiguous, or the value does not fit.
    """
    import yaml

    content = _plain(dataclasses.asdict(recipe))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InputError(f"an override must be key=value, got {assignment!r}")
        section, name = _resolve(key.strip(), content)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{key} must have a YAML value, got {text!r}: {error}") from error
        (content[section] if section else content)[name] = _number(value)
    return parse_recipe(content)


def differences(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two recipes differ, with the value of each."""
    a, b = _flat(dataclasses.asdict(first)), _flat(dataclasses.asdict(second))
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4, which lacks a point, for a string."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _resolve(key: str, content: Mapping[str, Any]) -> tuple[str, str]:
    """Section ("" for the top) and name of an override's key."""
    known = _flat(content)
    if key not in known:
        matches = [full for full in known if full.rpartition(".")[2] == key]
        if len(matches) > 1:
            raise InputError(f"key {key!r} is ambiguous: {' or '.join(matches)}")
        if not matches:
            names = [*known, *(full.rpartition(".")[2] for full in known)]
            raise InputError(f"there is no key {key!r} in a recipe{_suggestion(key, names)}")
        (key,) = matches
    section, _, name = key.rpartition(".")
    return section, name


def _build(cls: type[T], content: object, where: str) -> T:
    if not isinstance(content, Mapping):
        raise InputError(f"{where} must be a mapping, got {type(content).__name__}")
    types = typing.get_type_hints(cls)
    for key in content:
        if key not in types:
            raise InputError(f"{where} has no key {key!r}; there are {', '.join(types)}{_suggestion(str(key), types)}")
    required = [f.name for f in dataclasses.fields(cls) if _is_required(f)]  # type: ignore[arg-type]
    for key in required:
        if key not in content:
            raise InputError(f"{where} needs the key {key!r}")
    values = {key: _convert(value, types[key], f"{where}.{key}") for key, value in content.items()}
    try:
        return cls(**values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _suggestion(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(value: object, to: Any, where: str) -> Any:
    if dataclasses.is_dataclass(to):
        return _build(typing.cast(type, to), value, where)
    if typing.get_origin(to) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list, got {value!r}")
        item = typing.get_args(to)[0]
        return tuple(_convert(v, item, where) for v in value)
    if to is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, to) or (isinstance(value, bool) and to is not bool):
        raise InputError(f"{where} must be of type {to.__name__}, got {value!r}")
    return value
