"""What a load sweep leaves for `python -m engine.schedule predict`: costs, blocks and requests, as files."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.errors import LoadError
from engine.schedule.cost import CostTable
from engine.schedule.predict import stretch
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
        "stretches": _stretches(arms, records, tables),
        "traces": {name: found[:: max(1, len(found) // MOST_TRACES)] for name, found in blocks.items()},
    }
    try:
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{path} cannot be written: {error}") from error


def _stretches(
    arms: Sequence[Arm], records: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]], tables: Mapping[str, CostTable]
) -> dict[str, float]:
    """By concurrency, how much slower than its table says the machine was: the median of what the arms had learned."""
    drafts = {arm.name: arm.draft for arm in arms}
    blocks: dict[str, int] = {}
    for (name, _), seen in records.items():
        longest = max(
            (r["drafted"] for record in seen for r in record["requests"] if r["sitting"] != "lookup"), default=0
        )
        blocks[drafts[name]] = max(blocks.get(drafts[name], 1), longest)
    found: dict[str, list[float]] = {}
    for (name, concurrency), seen in records.items():
        if (table := tables.get(drafts[name])) is not None:
            factor = stretch(seen, table, blocks[drafts[name]])
            if factor is not None:
                found.setdefault(str(concurrency), []).append(factor)
    return {concurrency: statistics.median(factors) for concurrency, factors in found.items()}


def _draft_tokens(arm: Arm) -> int | None:
    return int(arm.policy[2]) if "--draft-tokens" in arm.policy else None
