"""A Dockerfile and a .dockerignore, read as far as tests need them: no image is built here."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Instruction:
    """One instruction of a stage. `text`: what follows its name, continuation lines joined."""

    stage: str
    name: str
    text: str


def read(path: Path) -> list[Instruction]:
    """Every instruction, FROM too; those before the first FROM belong to stage ''."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
    found: list[Instruction] = []
    stage = ""
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, text = line.strip().partition(" ")
        if not name:
            continue
        if name == "FROM":
            stage = text.split(" AS ")[1]
        found.append(Instruction(stage, name, text.strip()))
    return found


@dataclass(frozen=True)
class Copy:
    """`sources` out of the build context, or out of `stage`."""

    sources: tuple[str, ...]
    target: str
    stage: str | None


def copies(instructions: list[Instruction], stage: str) -> list[Copy]:
    """What a stage copies, in order."""
    found = []
    for each in instructions:
        if (each.stage, each.name) == (stage, "COPY"):
            words = shlex.split(each.text)
            origin = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
            *sources, target = [word for word in words if not word.startswith("--")]
            found.append(Copy(tuple(sources), target, origin))
    return found


class Ignore:
    """The rules of a .dockerignore: the last one that matches a path, or a folder above it, decides."""

    def __init__(self, text: str) -> None:
        rules = (line.strip() for line in text.splitlines())
        self._rules = [rule for rule in rules if rule and not rule.startswith("#")]

    def hides(self, path: str) -> bool:
        """Whether the build cannot see this path."""
        pure = PurePosixPath(path)
        names = [str(pure), *(str(parent) for parent in pure.parents if str(parent) != ".")]
        hidden = False
        for rule in self._rules:
            if any(_matches(name, rule.removeprefix("!")) for name in names):
                hidden = not rule.startswith("!")
        return hidden


def _matches(name: str, rule: str) -> bool:
    if rule.startswith("**/"):
        return any(fnmatchcase(part, rule[3:]) for part in name.split("/"))
    parts, pattern = name.split("/"), rule.split("/")
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))
