"""The server's real flags and variables, to which chart and compose are held."""

from __future__ import annotations

from collections.abc import Iterable

from server import options


def unknown_flags(names: Iterable[str]) -> set[str]:
    """Those that `python -m server` would refuse."""
    known = options._parser()._option_string_actions
    return {name for name in names if name not in known}


def unknown_variables(names: Iterable[str]) -> set[str]:
    """Those of DSPARK_… that mean no flag."""
    own = {name for name in names if name.startswith("DSPARK_")}
    return {name for name in own if unknown_flags([f"--{name.removeprefix('DSPARK_').lower().replace('_', '-')}"])}
