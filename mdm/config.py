"""Settings: YAML plus `section.key=value` into frozen dataclasses. An unknown key or a wrong type fails.

Knows nothing of what the settings mean: each file of mdm owns the dataclass of its own settings, and
checks values in `__post_init__`. Supported field types: int, float, bool, str, their `| None`,
tuples of them, and nested dataclasses. No Python in YAML, no interpolation.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import ConfigError, unknown

Settings = TypeVar("Settings")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if it is missing, not YAML or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings file {str(path)!r}: {error}") from error
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds a {type(value).__name__}; expected `section: {{key: value}}`"
        )
    return value


def override(tree: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`tree` with each "section.key=value" set; values are read as YAML, so `8`, `null`, `[a, b]` work."""
    result: dict[str, Any] = _deep_copy(tree)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"cannot read --set {assignment!r}; write section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value in --set {assignment!r} is not valid YAML") from error
        node = result
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {assignment!r}: {key!r} is a value, not a section")
        node[keys[-1]] = value
    return result


def build(kind: type[Settings], tree: Mapping[str, Any], where: str = "") -> Settings:
    """An instance of the dataclass `kind` from nested mappings.

    Raises ConfigError naming the key in full (`train.steps`), the value, and the nearest known key.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        if key not in fields:
            raise ConfigError(unknown("setting", name, [where + known for known in fields]))
        values[key] = _convert(hints[key], value, name)
    missing = [
        where + name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing setting {', '.join(missing)}")
    return kind(**values)


def to_tree(settings: Any) -> Any:
    """The inverse of `build`: plain dicts, lists and values, ready for YAML or JSON."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: to_tree(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, (list, tuple)):
        return [to_tree(item) for item in settings]
    return settings


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds; for `__post_init__` of settings."""
    if not condition:
        raise ConfigError(message)


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _convert(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`; ints are accepted for floats, lists for tuples, nothing else is guessed."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _convert(inner, value, name)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a section; got {value!r}")
        return build(kind, value, where=f"{name}.")  # type: ignore[arg-type]
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{name} must be a list; got {value!r}")
        return tuple(_convert(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is str:
        value = _float_of(value)  # YAML reads 1e-4, without a dot, as text
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {_plain(kind)}; got {value!r}")
    return value


def _float_of(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _plain(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        kind, str(kind)
    )
