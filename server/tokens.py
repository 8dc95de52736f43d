"""Bearer tokens from a TOML file: who may call, how much at once, and who may administer.

[[token]]
name = "search"              # in the log, never shown to other callers
token = "s3cr3t…"            # or: sha256 = "<its SHA-256 in hex>"
admin = false                # may call dspark.v1.SchedulerService
max_concurrent = 8           # generations at once; absent: no limit
max_queued = 16              # more that wait their turn; absent: no limit, 0: none
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import LoadError

SHORTEST = 16  # characters: a token that can be guessed is none
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEYS = frozenset({"name", "token", "sha256", "admin", "max_concurrent", "max_queued"})


@dataclass(frozen=True, slots=True)
class Grant:
    """One token's rights. `digest` is the SHA-256 of the token, which itself is not kept."""

    name: str
    digest: bytes
    admin: bool = False
    max_concurrent: int | None = None
    max_queued: int | None = None


class TokenTable:
    """Every grant."""

    def __init__(self, grants: Iterable[Grant]) -> None:
        self._grants = tuple(grants)

    def find(self, token: str) -> Grant | None:
        """Whose token this is. Takes the same time for every token, right or wrong."""
        digest = hashlib.sha256(token.encode("utf-8", errors="surrogateescape")).digest()
        found = None
        for grant in self._grants:
            if hmac.compare_digest(grant.digest, digest):
                found = grant
        return found


def load(path: Path) -> TokenTable:
    """Reads the file.

    Raises:
        LoadError: naming the file and the entry, never a token.
    """
    where = f"--auth-tokens {path}"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{where}: {error.strerror or error}; name a TOML file that can be read") from error
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at [^)]*\)$", str(error))  # the rest may quote the file, and so a token
        raise LoadError(f"{where}: not TOML {place[0] if place else ''}".rstrip()) from None
    except UnicodeDecodeError:
        raise LoadError(f"{where}: not UTF-8 text") from None
    entries = content.pop("token", None)
    if content or not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise LoadError(f"{where}: must be a list of [[token]] tables and nothing else")
    grants = [_grant(entry, f"{where}: token {number}") for number, entry in enumerate(entries, start=1)]
    for what, values in (("name", [g.name for g in grants]), ("token", [g.digest for g in grants])):
        if len(set(values)) < len(values):
            raise LoadError(f"{where}: two entries have the same {what}")
    return TokenTable(grants)


def _grant(entry: dict[str, Any], where: str) -> Grant:
    for key in entry:
        if key not in _KEYS:
            raise LoadError(f"{where}: unknown key {key!r}; there are {', '.join(sorted(_KEYS))}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LoadError(f"{where}: name must be 1 to 64 letters, digits, dots, dashes or underscores")
    where += f" ({name})"
    admin = entry.get("admin", False)
    if not isinstance(admin, bool):
        raise LoadError(f"{where}: admin must be true or false")
    return Grant(
        name=name,
        digest=_digest(entry, where),
        admin=admin,
        max_concurrent=_limit(entry, "max_concurrent", 1, where),
        max_queued=_limit(entry, "max_queued", 0, where),
    )


def _digest(entry: dict[str, Any], where: str) -> bytes:
    token, digest = entry.get("token"), entry.get("sha256")
    if (token is None) == (digest is None):
        raise LoadError(f"{where}: give either token or sha256")
    if token is not None:
        if not isinstance(token, str) or len(token) < SHORTEST or not all("!" <= c <= "~" for c in token):
            raise LoadError(f"{where}: token must be at least {SHORTEST} visible ASCII characters without spaces")
        return hashlib.sha256(token.encode()).digest()
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise LoadError(f"{where}: sha256 must be 64 hexadecimal digits")
    return bytes.fromhex(digest)


def _limit(entry: dict[str, Any], key: str, low: int, where: str) -> int | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise LoadError(f"{where}: {key} must be a whole number of at least {low}")
    return value
