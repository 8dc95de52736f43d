"""Decision records on their way: who gets which, what a slow reader loses, and what reaches the disk."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine.errors import LoadError
from server import recording
from server.recording import RoundFile
from server.rounds import MOST_AT_ONCE, RoundFeed


def record(number: int) -> dict[str, Any]:
    return {"round": number, "requests": [{"request_id": f"a#b#{number}"}]}


async def test_everybody_gets_the_rounds_they_asked_for_and_the_engine_is_told_which() -> None:
    told: list[int] = []
    feed = RoundFeed(told.append)
    fours, sixes = feed.open(every=4), feed.open(every=6)
    feed.publish([record(n) for n in range(2, 26, 2)])
    assert [r["round"] for r in (await fours.read())[0]] == [4, 8, 12, 16, 20, 24]
    assert [r["round"] for r in (await sixes.read())[0]] == [6, 12, 18, 24]
    feed.leave(fours)
    feed.renew()
    feed.leave(sixes)
    feed.leave(sixes)
    assert told == [4, 2, 6, 6, 0]


async def test_a_slow_reader_loses_the_oldest_and_is_told_how_many() -> None:
    feed = RoundFeed(lambda every: None)
    watcher = feed.open(limit=100)
    feed.publish([record(n) for n in range(1, 251)])
    first, lost = await watcher.read()
    assert (lost, first[0]["round"], len(first)) == (150, 151, MOST_AT_ONCE)
    assert first[0]["requests"][0]["request_id"] == "a#b", "the client's own name"
    rest, lost = await watcher.read()
    assert (lost, rest[-1]["round"]) == (0, 250)


async def test_a_closed_feed_is_read_to_its_end() -> None:
    feed = RoundFeed(lambda every: None)
    watcher = feed.open()
    reading = asyncio.ensure_future(watcher.read())
    await asyncio.sleep(0)
    feed.publish([record(1)])
    feed.close()
    assert [r["round"] for r in (await reading)[0]] == [1]
    assert (await watcher.read())[0] == []
    assert (await feed.open().read())[0] == []


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_the_file_holds_every_round_and_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    file, feed = RoundFile(path, limit_bytes=4000), RoundFeed(lambda every: None)
    writing = asyncio.ensure_future(file.follow(feed))
    for start in range(0, 400, 40):
        await asyncio.sleep(0.01)
        feed.publish([record(n) for n in range(start, start + 40)])
    feed.close()
    await writing
    older, newer = lines(path.with_name("rounds.jsonl.1")), lines(path)
    numbers = [entry["round"] for entry in (*older, *newer)]
    assert numbers == list(range(numbers[0], 400))
    assert max(path.stat().st_size, path.with_name("rounds.jsonl.1").stat().st_size) <= 4000


def test_a_full_disk_costs_records_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rounds.jsonl"
    file = RoundFile(path, 10**6)
    file.write([record(1)])
    append = file._append
    monkeypatch.setattr(recording, "RETRY_S", 0.0)
    monkeypatch.setattr(file, "_append", RoundFile(Path("/dev/full"), 10**6)._append)
    with caplog.at_level(logging.WARNING):
        file.write([record(2), record(3)])
        file.write([record(4)], lost=5)
    assert [r.message for r in caplog.records] == ["rounds_not_recorded"]
    monkeypatch.setattr(file, "_append", append)
    file.write([record(5)])
    assert [entry.get("round", entry) for entry in lines(path)] == [1, {"lost": 8}, 5]


def test_a_file_that_cannot_be_written_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"--record-rounds .*nowhere/rounds"):
        RoundFile(tmp_path / "nowhere" / "rounds", 1000)
