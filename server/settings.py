"""Where a command line's values come from: flag over environment over file over default.

--max-running 8        the flag
DSPARK_MAX_RUNNING=8   the variable; an empty one counts as not set
max_running = 8        the key of the TOML file that --config (or DSPARK_CONFIG) names
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import LoadError

PREFIX = "DSPARK_"
FOREIGN = frozenset({"DSPARK_TOKEN"})  # the command-line client's
# What Kubernetes sets in every pod for a service whose name begins with ours.
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_MISSING = object()


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that names the file."""
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of settings, keys are flag names with underscores (max_running = 8)"
    )


def read(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Every setting's value, and in words where it came from.

    A wrong flag ends the process with code 2 and a message, as argparse does.

    Raises:
        LoadError: an unknown name or a wrong value in the environment or the file; names it, and the mend.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    blank = argparse.Namespace(**dict.fromkeys(actions, _MISSING))
    flags = {name: value for name, value in vars(parser.parse_args(arguments, blank)).items() if value is not _MISSING}
    variables = _from_environment(actions, environ)
    config = flags.get("config", variables.get("config"))
    stored = _from_file(actions, Path(config)) if config is not None else {}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, action in actions.items():
        values[name], sources[name] = action.default, "default"
        for given, source in (
            (stored, f"file {config}"),
            (variables, f"environment {variable(name)}"),
            (flags, f"flag {action.option_strings[-1]}"),
        ):
            if name in given:
                values[name], sources[name] = given[name], source
    return argparse.Namespace(**values), sources


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def _from_environment(actions: Mapping[str, argparse.Action], environ: Mapping[str, str]) -> dict[str, Any]:
    known = {variable(name): name for name in actions}
    values = {}
    for key in sorted(environ):
        if not key.startswith(PREFIX) or key in FOREIGN or not environ[key]:
            continue
        if key in known:
            values[known[key]] = _value(actions[known[key]], environ[key], f"environment variable {key}")
        elif not _SERVICE_LINK.search(key):
            raise LoadError(f"environment variable {key}: no such setting{_nearest(key, known)}; unset it")
    return values


def _from_file(actions: Mapping[str, argparse.Action], path: Path) -> dict[str, Any]:
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"--config {path}: {error.strerror or error}; name a TOML file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"--config {path}: not TOML: {error}") from error
    known = {name for name in actions if name != "config"}
    for key in stored:
        if key not in known:
            raise LoadError(f"{path}: key {key!r}: no such setting{_nearest(key, known)}; remove it")
    return {key: _value(actions[key], value, f"{path}: key {key!r}") for key, value in stored.items()}


def _value(action: argparse.Action, given: object, where: str) -> Any:
    """`given` as the flag would take it.

    Raises:
        LoadError: the flag would not take it.
    """
    if action.nargs == 0:  # a flag that is there or not
        on = given if isinstance(given, bool) else _WORDS.get(str(given).strip().lower())
        if on is None:
            raise LoadError(f"{where}: {given!r} is neither true nor false")
        return on
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise LoadError(f"{where}: {given!r} is neither a text nor a number")
    text = str(given)
    try:
        value = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, argparse.ArgumentTypeError) else f"{text!r} is not a number"
        raise LoadError(f"{where}: {reason}; it means the same as {action.option_strings[-1]}") from error
    if action.choices is not None and value not in action.choices:
        raise LoadError(f"{where}: {text!r} is not one of {', '.join(map(str, action.choices))}")
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
