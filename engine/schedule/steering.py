"""What may change while an engine runs, within what it was started with. Pure: values in, values out.

Imports nothing heavy, so that a process without PyTorch can check a change before it crosses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from engine.config import POLICIES, EngineConfig
from engine.messages import PolicySettings

MOST_WAITING = 65536
STEERABLE = tuple(field.name for field in fields(PolicySettings))


def settings(config: EngineConfig, *, drafts: bool) -> PolicySettings:
    """The part of a configuration that may change; without a drafter every policy is plain."""
    values = {name: getattr(config, name) for name in STEERABLE}
    return PolicySettings(**{**values, "policy": config.policy if drafts else "plain"})


def policies(*, drafts: bool) -> tuple[str, ...]:
    """Names that may be chosen."""
    return POLICIES if drafts else ("plain",)


def problems(changes: Mapping[str, Any], start: EngineConfig, block_size: int) -> Iterator[tuple[str, str]]:
    """What is wrong with each change: its name, and the mend.

    Args:
        changes: by name of PolicySettings.
        start: what the engine was started with; caches, buffers and the cost table are made for that.
        block_size: γ, 0 without a drafter.
    """
    room = start.max_batch_tokens - start.max_running
    ranges = {
        "draft_tokens": (0, block_size, "the drafter's block"),
        "confidence_threshold": (0.0, 1.0, "certainty"),
        "max_running": (1, start.max_running, "what the server was started with"),
        "prefill_chunk": (1, room, "what max_batch_tokens leaves beside max_running"),
        "max_queue": (1, MOST_WAITING, "more would only wait"),
    }
    for name, value in changes.items():
        if name == "policy":
            names = policies(drafts=block_size > 0)
            if value not in names:
                why = "" if block_size else "; this server has no drafter"
                yield name, f"{value!r} is not one of {', '.join(names)}{why}"
        elif name == "draft_tokens" and value is None:
            continue
        else:
            low, high, what = ranges[name]
            if not low <= value <= high:
                yield name, f"must be from {low:g} to {high:g} ({what}), got {value:g}"
