"""What a load sweep leaves for `python -m engine.schedule predict`: costs, blocks and requests, as files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.errors import LoadError
from engine.schedule.cost import CostTable
from engine.schedule.replay import traces
from engine.schedule.store import decode
from tests.bench.load_arms import Arm
from tests.bench.load_boundary import between_s
from tests.bench.load_client import mixed_jobs
from tests.bench.measure import Subject

MOST_TRACES = 400
FULLY_VERIFIED = {"dspark-fixed-7": "dspark", "dflash": "dflash", "eagle3": "eagle3", "mtp1": "mtp"}


def read_tables(folder: Path) -> dict[str, CostTable]:
    """The cost tables that the servers measured, by drafter; each has a folder of its own."""
    tables = {}
    for own in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else ():
        kept = sorted(own.glob("*.json"), key=lambda path: path.stat().st_mtime)
        if kept:
            tables[own.name] = decode(json.loads(kept[-1].read_text(encoding="utf-8"))["table"])
    return tables


def write_profiles(
    path: Path,
    arms: Sequence[Arm],
    subject: Subject,
    records: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
    tables: Mapping[str, CostTable],
) -> None:
    """Writes the file that `predict` reads beside points.jsonl.

    Raises:
        LoadError: it cannot be written.
    """
    jobs = mixed_jobs(subject)
    lengths = map(len, subject.encode([job.prompt for job in jobs]))
    requests = [[length, job.tokens] for length, job in zip(lengths, jobs, strict=True)]
    blocks: dict[str, list[Any]] = {}
    for (name, _), seen in records.items():
        if (draft := FULLY_VERIFIED.get(name)) is not None:
            blocks.setdefault(draft, []).extend(
                [[[round(a, 5) for a in block.survival], block.accepted] for block in trace.blocks]
                for trace in traces(seen)
            )
    content = {
        "requests": requests,
        "arms": {
            arm.name: {"draft": arm.draft, "policy": arm.policy[0], "draft_tokens": _draft_tokens(arm)} for arm in arms
        },
        "tables": {name: asdict(table) for name, table in tables.items()},
        "between_s": {str(count): between_s(count) for count in sorted({count for _, count in records})},
        "cores": len(os.sched_getaffinity(0)),
        "traces": {name: found[:: max(1, len(found) // MOST_TRACES)] for name, found in blocks.items()},
    }
    try:
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{path} cannot be written: {error}") from error


def _draft_tokens(arm: Arm) -> int | None:
    return int(arm.policy[2]) if "--draft-tokens" in arm.policy else None
