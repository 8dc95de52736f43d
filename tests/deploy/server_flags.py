"""The server's real flags and variables, to which chart and compose are held."""

from __future__ import annotations

from collections.abc import Iterable

from server import options
from tests.deploy.chart import ROOT

# Flags that come with a part of the server, which not every version of it has: missing only together with the part.
PARTS = {
    "--metrics-port": "telemetry",
    "--admin-listen": "scheduler_service.py",
    **dict.fromkeys(("--tls-cert", "--tls-key", "--tls-client-ca"), "tls.py"),
    "--auth-tokens": "access.py",
    **dict.fromkeys(("--max-message-bytes", "--max-prompt-bytes", "--max-prompt-tokens"), "bounds.py"),
}


def unknown_flags(names: Iterable[str]) -> set[str]:
    """Those that `python -m server` would refuse."""
    known = options._parser()._option_string_actions
    return {name for name in names if name not in known and not is_to_come(name)}


def is_to_come(name: str) -> bool:
    """Whether it belongs to a part that this version of the server lacks."""
    return name in PARTS and not (ROOT / "server" / PARTS[name]).exists()


def unknown_variables(names: Iterable[str]) -> set[str]:
    """Those of DSPARK_… that mean no flag."""
    own = {name for name in names if name.startswith("DSPARK_")}
    return {name for name in own if unknown_flags([f"--{name.removeprefix('DSPARK_').lower().replace('_', '-')}"])}
