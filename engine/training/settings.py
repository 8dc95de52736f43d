"""Typed configuration: frozen dataclasses from TOML, with overrides; unknown keys are refused by name.

Knows no particular configuration. A field's type may be int, float, str, bool, Path, a tuple of one of
them, one of these or None, a Literal, or another such dataclass (a table).
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class SettingsError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the mend."""


def knob(default: Any, text: str) -> Any:
    """A field with a default and the line that --help shows."""
    return dataclasses.field(default=default, metadata={"help": text})


def table(kind: type[T], text: str) -> T:
    """A field that is a table with defaults."""
    made: Any = dataclasses.field(default_factory=kind, metadata={"help": text})
    return typing.cast(T, made)


def read(path: Path) -> dict[str, Any]:
    """A TOML file as nested tables.

    Raises:
        SettingsError: missing, or no TOML; names the file (and the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{path} is missing; `python -m engine.training train --help` shows what to put in it"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path} is not readable TOML: {error}") from error


def override(tables: dict[str, Any], assignment: str) -> None:
    """Apply one `table.key=value`; the value is TOML, or else a plain string.

    Raises:
        SettingsError: no `=`, or a key below something that is no table.
    """
    name, found, text = assignment.partition("=")
    if not found or not name.strip():
        raise SettingsError(f"--set {assignment!r}: write KEY=VALUE, for example --set optim.muon_lr=0.01")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, key = name.strip().split(".")
    for part in path:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise SettingsError(f"--set {assignment!r}: {part} is no table")
    tables[key] = value


def build(kind: type[T], values: dict[str, Any], source: str, prefix: str = "") -> T:
    """An instance of the dataclass `kind` from nested tables.

    Args:
        source: where the values come from, for messages.

    Raises:
        SettingsError: an unknown key, a missing one, or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(fields)}"
            raise SettingsError(f"{source}: {prefix}{key} is unknown; {hint}")
    made = {}
    for name, field in fields.items():
        if name in values:
            value = values[name]
            if isinstance(value, dict) and field.default_factory is not dataclasses.MISSING:
                value = merge(plain(field.default_factory()), value)  # a table's other keys keep their defaults
            made[name] = convert(hints[name], value, source, f"{prefix}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SettingsError(f"{source}: {prefix}{name} is missing; {field.metadata.get('help', 'give it')}")
    try:
        return kind(**made)
    except SettingsError as error:
        raise SettingsError(f"{source}: {prefix}{error}") from None


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the keys of `over` in their place, table by table."""
    both = dict(under)
    for key, value in over.items():
        mine = both.get(key)
        both[key] = merge(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return both


def convert(kind: Any, value: Any, source: str, name: str) -> Any:
    """`value` as `kind`.

    Raises:
        SettingsError: it is of another type; names the key.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, dict):
            return build(kind, value, source, f"{name}.")
    elif kind is Any:
        return value
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise SettingsError(f"{source}: {name} must be one of {', '.join(map(str, arguments))}; got {value!r}")
    elif origin in (typing.Union, types.UnionType):
        rest = [part for part in arguments if part is not type(None)]
        if value is None and len(rest) < len(arguments):
            return None
        return convert(rest[0], value, source, name)
    elif origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(arguments[0], item, source, name) for item in items)
    elif kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
        return value
    raise SettingsError(f"{source}: {name} must be {describe(kind)}, got {value!r}")


def describe(kind: Any) -> str:
    """A type in a reader's words."""
    plain = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a path"}
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"a list, each {describe(arguments[0])}"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if arguments:
        return describe(arguments[0])
    return plain.get(kind, "a table")


def plain(value: Any) -> Any:
    """A settings object as nested dictionaries of plain values, paths as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def explain(kind: type, prefix: str = "") -> list[str]:
    """One line a key: name = default, what it does."""
    hints, lines = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            lines += explain(typing.cast(type, hint), f"{name}.")
            continue
        given = field.default is not dataclasses.MISSING
        shown = f" = {_toml(plain(field.default))}" if given else " (needed)"
        lines.append(f"  {name + shown:<42} {field.metadata.get('help', '')}")
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else "none" if value is None else str(value)
