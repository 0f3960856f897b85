"""Recipes: one YAML file per system, read into the dataclasses of :mod:`fastgan.recipes.schema`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from fastgan._checks import InputError
from fastgan.recipes.schema import DataConfig, LogConfig, ModelConfig, Recipe, TrainConfig

__all__ = [
    "AUTO",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "Recipe",
    "TrainConfig",
    "automatic",
    "available",
    "differences",
    "dump_recipe",
    "explain_recipe",
    "load_recipe",
    "override",
    "override_values",
    "parse_recipe",
]

T = TypeVar("T")

AUTO = "auto"
"""Value, in a recipe, of a setting that follows from the data; None in Python, unless its values are strings."""
_BY_DATA = ("data.", "model.")


def available() -> list[str]:
    """Names of the recipes that come with the package.

    Example:
        >>> "sagan" in available()
        True
    """
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe by its name (one of :func:`available`) or from your own YAML file.

    Raises:
        InputError: there is no such recipe, or it has an unknown key or a value of the wrong type or range.

    Example:
        >>> load_recipe("sagan").train.loss
        'hinge'
    """
    import yaml

    if isinstance(recipe, str) and recipe in available():
        text = resources.files(__package__).joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    elif Path(recipe).is_file():
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"recipe {recipe} is not a text file: {error}") from error
    else:
        raise InputError(
            f"recipe must be one of {', '.join(available())} or a YAML file, got {str(recipe)!r}"
            f"{_suggestion(str(recipe), available())}"
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {recipe} is not valid YAML: {error}") from error
    try:
        return parse_recipe(content)
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from error


def parse_recipe(content: object) -> Recipe:
    """Build a :class:`Recipe` from nested mappings; raises as :func:`load_recipe`.

    Example:
        >>> parse_recipe({"name": "mine", "train": {"steps": 100}}).train.steps
        100
    """
    return _build(Recipe, content, "recipe")


def dump_recipe(recipe: Recipe) -> str:
    """Write every key of ``recipe`` as YAML, which :func:`parse_recipe` turns into an equal recipe.

    Example:
        >>> print(dump_recipe(load_recipe("sagan")).splitlines()[0])
        name: sagan
    """
    import yaml

    return yaml.safe_dump(_content(recipe), sort_keys=False)


def explain_recipe(recipe: Recipe) -> str:
    """Write ``recipe`` as YAML with a comment on each setting; :func:`load_recipe` reads it back.

    Example:
        >>> print(explain_recipe(load_recipe("sagan")).splitlines()[0])
        name: sagan
    """
    import yaml

    lines = []
    for section, values in _content(recipe).items():
        if not isinstance(values, dict):
            lines.append(yaml.safe_dump({section: values}, width=1000).rstrip())
            continue
        config = getattr(recipe, section)
        meanings = _meanings(type(config))
        lines += ["", f"# {(type(config).__doc__ or '').splitlines()[0]}", f"{section}:"]
        for name, value in values.items():
            comment = textwrap.wrap(meanings.get(name, "").replace("``", "`"), 110)
            lines += [f"  # {line}" for line in comment]
            lines.append(f"  {name}: {yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}")
    return "\n".join(lines) + "\n"


def _meanings(config: type) -> dict[str, str]:
    """Descriptions of a section's settings from its docstring; those of several are under the first name."""
    meanings: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            names, _, text = line.strip().partition(": ")
            name, *others = names.split(", ")
            meanings[name] = f"{names}: {text}" if others else text
        elif line.strip():
            meanings[name] += f" {line.strip()}"
    return meanings


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Apply ``key=value`` assignments to ``recipe``; values are YAML.

    A key is dotted (``train.steps``), or a field's name alone (``steps``) if only one section has it.

    Raises:
        InputError: an assignment has no "=", its key is unknown or ambiguous, or the value does not fit.

    Example:
        >>> override(load_recipe("sagan"), ["steps=2e3", "train.loss=lsgan"]).train.steps
        2000
    """
    import yaml

    content, known = _content(recipe), list(_flat(recipe))
    for assignment in assignments:
        given, equals, text = assignment.partition("=")
        if not equals or not given:
            raise InputError(f"an override must be key=value, got {assignment!r}")
        key = given.strip()
        matches = [key] if key in known else [full for full in known if full.rpartition(".")[2] == key]
        if len(matches) > 1:
            raise InputError(f"key {key!r} is ambiguous: {' or '.join(matches)}")
        if not matches:
            elsewhere = [full for full in known if full.rpartition(".")[2] == key.rpartition(".")[2]]
            names = [*known, *(full.rpartition(".")[2] for full in known)]
            hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else _suggestion(key, names)
            raise InputError(f"there is no key {key!r} in a recipe{hint}")
        section, _, name = matches[0].rpartition(".")
        try:
            (content[section] if section else content)[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{given} must have a YAML value, got {text!r}: {error}") from error
    return parse_recipe(content)


def override_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """``recipe`` with Python values in place of those at dotted keys.

    Example:
        >>> override_values(load_recipe("sagan"), {"train.steps": 2000}).train.steps
        2000
    """
    content = _content(recipe)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    return parse_recipe(content)


def automatic(recipe: Recipe) -> list[str]:
    """Dotted keys of the settings that follow from the data.

    Example:
        >>> automatic(override(load_recipe("sagan"), ["resolution=auto"]))
        ['data.flip', 'model.resolution']
    """
    return [key for key, value in _flat(recipe).items() if value is None or value == AUTO if key.startswith(_BY_DATA)]


def differences(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two recipes differ, with both values.

    Example:
        >>> recipe = load_recipe("sagan")
        >>> differences(recipe, override(recipe, ["batch_size=8"]))
        {'train.batch_size': (64, 8)}
    """
    a, b = _flat(first), _flat(second)
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def _content(recipe: Recipe) -> dict[str, Any]:
    """Nested mappings of plain values, with lists for tuples and "auto" for None."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for section in content.values():
        if isinstance(section, dict):
            section |= {name: AUTO for name, value in section.items() if value is None}
    return content


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(recipe).items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _suggestion(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _build(cls: type[T], content: object, where: str) -> T:
    if not isinstance(content, Mapping):
        raise InputError(f"{where} must be a mapping, got {type(content).__name__}")
    types = typing.get_type_hints(cls)
    for key in content:
        if key not in types:
            raise InputError(f"{where} has no key {key!r}; there are {', '.join(types)}{_suggestion(str(key), types)}")
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in content:
            raise InputError(f"{where} needs the key {f.name!r}")
    values = {key: _convert(value, types[key], f"{where}.{key}") for key, value in content.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _convert(value: object, to: Any, where: str) -> Any:
    if type(None) in typing.get_args(to):
        if value is None or value == AUTO:
            return None
        (to,) = (kind for kind in typing.get_args(to) if kind is not type(None))
    if dataclasses.is_dataclass(to):
        return _build(typing.cast(type, to), value, where)
    if typing.get_origin(to) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(v, typing.get_args(to)[0], where) for v in value)
    if to in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            number = float(value)  # also of a string: YAML 1.1 takes 1e-4, without a point, for one
            if to is float:
                return number
            if number.is_integer():
                return value if isinstance(value, int) else int(number)
    if not isinstance(value, to) or (isinstance(value, bool) and to is not bool):
        raise InputError(f"{where} must be of type {to.__name__}, got {value!r}")
    return value
