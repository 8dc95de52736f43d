"""`python -m clients load` against a server with a scripted engine, and its sums."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.__main__ import run
from clients.client import Client
from clients.events import Options, Speculation
from clients.load import command
from clients.load.arrivals import Arrival
from clients.load.plot import plotting_missing
from clients.load.report import Goals, make_report, percentile, warnings
from clients.load.runner import CANCELLED, FAILED, FINISHED, Runner, Sample
from clients.retry import NEVER
from engine.errors import QueueFull
from engine.messages import Request
from tests.server.conftest import Launch, Running, until

REPLY = "hello there " * 10


async def load(running: Running, capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> dict[str, Any]:
    assert await run(["load", "--server", running.address, "--json", *flags]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def hello(tmp_path: Path) -> str:
    """A prompt file that the scripted engine likes."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello"}\n{"prompt": "hello world"}\n')
    return str(path)


def write_trace(path: Path, *entries: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps({"at_s": 0, "prompt": "hello", **entry}) + "\n" for entry in entries))
    return str(path)


async def test_requests_do_not_wait_for_each_other(launch: Launch) -> None:
    gate = threading.Semaphore(0)  # no round ends before all requests are sent: a closed loop would wait for ever
    running = await launch("hello", gate=gate, max_queue=64)
    async with Client(running.address, retry=NEVER) as client:
        runner = Runner(client, Options(), timeout_s=60, name="x")
        playing = asyncio.ensure_future(runner.run([Arrival(0.01 * i, "hi", 5) for i in range(40)]))
        await until(lambda: len(runner.samples) == 40)
        assert all(sample.first_s is None for sample in runner.samples)
        released = runner.now_s
        gate.release(10_000)
        await playing
    assert {sample.outcome for sample in runner.samples} == {FINISHED}
    assert len({sample.request_id for sample in runner.samples}) == 40
    for number, sample in enumerate(runner.samples):  # and the wait counts from when each was to be sent
        assert sample.scheduled_s == pytest.approx(0.01 * number)
        assert sample.sent_s >= sample.scheduled_s
        assert sample.ttft_s is not None and sample.ttft_s >= released - sample.scheduled_s


async def test_a_report(launch: Launch, capsys: pytest.CaptureFixture[str], tmp_path: Path, hello: str) -> None:
    running = await launch(REPLY, eos=False, max_queue=64)
    kept = tmp_path / "samples.jsonl"
    flags = (
        "--prompts",
        hello,
        "--rate",
        "200",
        "--requests",
        "20",
        "--max-tokens",
        "10:1,13:1",
        "--cold",
        "--samples",
        str(kept),
    )
    report = await load(running, capsys, *flags, "--ttft-goal", "60", "--tpot-goal", "60")
    assert report["requests"] == {
        "offered": 20, "finished": 20, "cancelled": 0, "failed": 0, "waiting": 0, "warmup": 0
    }  # fmt: skip
    assert (report["errors"], report["finish_reasons"]) == ({}, {"length": 20})
    lengths = [request.end.max_tokens for request in running.engine.seen]
    assert report["tokens"]["completion"] == sum(lengths) and set(lengths) == {10, 13}
    assert report["tokens"]["prompt"] == sum(len(request.prompt) for request in running.engine.seen)
    # By hand: one token out of prefill, then three a round, two of them accepted drafts.
    assert report["speculation"]["rounds"] == sum((length - 1) // 3 for length in lengths)
    assert report["speculation"]["mean_accepted_length"] == pytest.approx(3.0)
    assert report["speculation"]["accepted_share_by_position"] == [1.0, 1.0]
    assert len({request.cache_salt for request in running.engine.seen}) == 20
    for name in ("ttft_s", "e2e_s", "server_queue_s", "send_lag_s"):
        summary = report[name]
        assert (summary["count"], summary["at_deadline"]) == (20, 0)
        assert 0 <= summary["p50"] <= summary["p90"] <= summary["p95"] <= summary["p99"] <= summary["max"]
    assert report["goals"] == {"ttft_s": 60.0, "tpot_s": 60.0, "judged": 20, "met": 20, "share": 1.0}
    samples = [json.loads(line) for line in kept.read_text().splitlines()]
    assert percentile(sorted(s["e2e_s"] for s in samples), 90) == pytest.approx(report["e2e_s"]["p90"])
    assert report["server"]["model"] == "scripted"


async def test_streams_are_hung_up_on_part_way(launch: Launch, capsys: pytest.CaptureFixture[str], hello: str) -> None:
    gate = threading.Semaphore(0)
    running = await launch(REPLY, eos=False, max_queue=64, gate=gate, block=1)
    flags = ("--prompts", hello, "--rate", "500", "--requests", "6", "--cancel", "1", "--max-tokens", "200")
    loading = asyncio.ensure_future(load(running, capsys, *flags))
    while not loading.done() or running.engine.running:  # slow rounds: the news must overtake the text
        gate.release()
        await asyncio.sleep(0.005)
    report = await loading
    assert report["requests"]["cancelled"] == 6
    assert 0 < report["tokens"]["completion"] < 6 * 200
    assert report["e2e_s"]["count"] == 0 and report["ttft_s"]["count"] == 6
    assert len(running.engine.cancelled) == 6


async def test_errors_are_counted_by_code(
    launch: Launch, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Semaphore(0)
    running = await launch(REPLY, eos=False, gate=gate, max_queue=2, block=1)
    refused: list[str] = []
    submit = running.engine.submit

    def watched(request: Request) -> None:
        try:
            submit(request)
        except QueueFull:
            refused.append(request.request_id)
            raise

    monkeypatch.setattr(running.engine, "submit", watched)
    trace = write_trace(tmp_path / "t.jsonl", *({"prompt": "hello" * n, "max_tokens": 400} for n in (1, 1, 1, 9_000)))
    loading = asyncio.ensure_future(load(running, capsys, "--trace", trace, "--timeout", "3", code=1))
    while not refused and not loading.done():  # requests are taken in between rounds
        gate.release()
        await asyncio.sleep(0.005)
    gate.release(20)  # the refusal leaves after a round
    report = await loading
    gate.release(10_000)
    assert report["errors"] == {"DEADLINE_EXCEEDED": 2, "RESOURCE_EXHAUSTED": 1, "INVALID_ARGUMENT": 1}
    # The two that waited in vain are the slowest; refusals at once do not make the service look fast.
    assert (report["e2e_s"]["count"], report["e2e_s"]["at_deadline"]) == (2, 2)
    assert report["e2e_s"]["p50"] >= 2.9


async def test_ctrl_c_reports_what_there_is(launch: Launch, capsys: pytest.CaptureFixture[str], hello: str) -> None:
    gate = threading.Semaphore(0)
    running = await launch("hello", gate=gate, max_queue=64)
    handler = signal.getsignal(signal.SIGINT)
    line = ["load", "--server", running.address, "--json", "--prompts", hello, "--rate", "200", "--duration", "60"]
    loading = asyncio.ensure_future(run(line))
    await until(lambda: len(running.engine.seen) >= 1)
    os.kill(os.getpid(), signal.SIGINT)
    assert await loading == 0
    printed = capsys.readouterr()
    requests = json.loads(printed.out)["requests"]
    assert requests["waiting"] == requests["offered"] >= 1
    assert "under way" in printed.err
    assert signal.getsignal(signal.SIGINT) is handler
    gate.release(10_000)
    await until(lambda: not running.engine.running)


async def test_a_table_for_people(launch: Launch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    running = await launch(REPLY, eos=False, max_queue=1)
    trace = write_trace(tmp_path / "t.jsonl", {"max_tokens": 7, "at_s": 0}, {"prompt": "hello" * 9_000, "at_s": 1})
    line = ["load", "--server", running.address, "--trace", trace, "--speed", "10", "--ttft-goal", "60"]
    assert await run(line) == 0
    out = capsys.readouterr().out
    assert "2 offered: 1 finished · 1 failed" in out
    assert "errors: INVALID_ARGUMENT 1" in out
    assert "within first token 60000 ms: 50.0% (1 of 2)" in out
    assert "mean accepted length 3.00" in out


async def test_without_matplotlib_the_figures_are_still_printed(
    launch: Launch, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hello: str
) -> None:
    running = await launch("hello")
    monkeypatch.setattr("clients.load.plot.find_spec", lambda name: None)
    path = tmp_path / "load.png"
    assert plotting_missing()
    flags = ("--prompts", hello, "--rate", "100", "--requests", "1", "--plot", str(path))
    assert await run(["load", "--server", running.address, "--json", *flags]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["requests"]["finished"] == 1
    assert "pip install -r requirements/train.txt" in printed.err
    assert not path.exists()


async def test_the_plot_is_a_picture(
    launch: Launch, capsys: pytest.CaptureFixture[str], tmp_path: Path, hello: str
) -> None:
    pytest.importorskip("matplotlib", reason="plots need requirements/train.txt")
    running = await launch(REPLY, eos=False, max_queue=4)
    path = tmp_path / "load.png"
    flags = ("--prompts", hello, "--rate", "300", "--requests", "30", "--cancel", "0.3")
    await load(running, capsys, *flags, "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert await run(["load", "--server", running.address, *flags, "--plot", str(tmp_path / "x.nope")]) == 1
    assert "nope" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("", "--rate --trace"),
        ("--rate 0", "above 0"),
        ("--rate nan", "above 0"),
        ("--rate 1 --trace x", "not allowed with"),
        ("--trace /no/such/file", "/no/such/file"),
        ("--rate 1 --speed 2", "--speed"),
        ("--trace x --burstiness 2", "--burstiness"),
        ("--rate 1 --duration 3 --warmup 3", "--warmup"),
        ("--rate 0.01 --duration 1", "no request arrives"),
        ("--rate 1 --cancel 1.5", "0 to 1"),
        ("--rate 1 --max-tokens 5-2", "smaller one first"),
        ("--rate 1 --requests 0", "at least 1"),
        ("--rate 1 --plot /no/such/folder/x.png", "there is no folder"),
    ],
)
async def test_wrong_flags_are_refused(
    launch: Launch, capsys: pytest.CaptureFixture[str], flags: str, complaint: str
) -> None:
    running = await launch("hello")
    with pytest.raises(SystemExit, match="2"):
        await run(["load", "--server", running.address, *flags.split()])
    assert complaint in capsys.readouterr().err


def sample(number: int, **changes: Any) -> Sample:
    whole = Sample(
        f"s-{number}", scheduled_s=number, sent_s=number, first_s=number + 0.5, last_s=number + 2.5, end_s=number + 3.0,
        outcome=FINISHED, reason="length", tokens=22, first_tokens=2, longest_gap_s=0.2, queue_s=0.1,
    )  # fmt: skip
    return replace(whole, **changes)


def test_percentiles_are_numpys() -> None:
    rng = random.Random(3)
    for count in (1, 2, 3, 10, 101):
        values = sorted(rng.random() for _ in range(count))
        for percent in command_percentiles():
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def command_percentiles() -> tuple[float, ...]:
    return (0, 12.5, 50, 90, 95, 99, 100)


def test_latencies_count_from_the_scheduled_arrival() -> None:
    late = sample(0, scheduled_s=-4.0)  # sent four seconds late, by a generator or a connection that was held up
    report = make_report([late], Goals(), warmup_s=-10)
    assert report["ttft_s"]["p50"] == pytest.approx(4.5)
    assert report["e2e_s"]["p50"] == pytest.approx(7.0)
    assert report["tpot_s"]["p50"] == pytest.approx(0.1)  # twenty tokens after the first message, in two seconds
    assert report["send_lag_s"]["max"] == pytest.approx(4.0)
    assert "too slow for the rate" in warnings(report)[0]


def test_a_deadline_is_a_lower_bound_and_not_a_gap_in_the_figures() -> None:
    done = [sample(number) for number in range(8)]
    nothing = sample(
        8, first_s=None, last_s=None, tokens=0, first_tokens=0, end_s=28.0, outcome=FAILED, code="DEADLINE_EXCEEDED"
    )
    half = sample(9, end_s=29.0, outcome=FAILED, code="DEADLINE_EXCEEDED", reason="")
    report = make_report([*done, nothing, half], Goals(ttft_s=1, tpot_s=1))
    assert (report["ttft_s"]["count"], report["ttft_s"]["at_deadline"], report["ttft_s"]["max"]) == (10, 1, 20.0)
    assert (report["e2e_s"]["count"], report["e2e_s"]["at_deadline"], report["e2e_s"]["max"]) == (10, 2, 20.0)
    assert report["goals"]["met"] == 8 and report["goals"]["judged"] == 10


def test_cancelled_requests_and_the_warm_up_do_not_count_where_they_should_not() -> None:
    samples = [sample(0), sample(1), sample(2, outcome=CANCELLED, reason=""), sample(3, first_s=3.9)]
    report = make_report(samples, Goals(ttft_s=0.6), warmup_s=1.0)
    assert (report["requests"]["offered"], report["requests"]["warmup"]) == (3, 1)
    assert report["e2e_s"]["count"] == 2 and report["ttft_s"]["count"] == 3
    assert (report["goals"]["met"], report["goals"]["judged"]) == (1, 2)
    assert report["most_in_flight"] == 3
    assert report["seconds"] == pytest.approx(5.0)
    assert report["tokens_per_s"] == pytest.approx(66 / 5)


def test_acceptance_adds_up_over_requests_of_different_lengths() -> None:
    one = Speculation(10, 70, 20, 12, 2.2, (10, 10), (8, 4), (0.8, 0.5))
    two = Speculation(30, 210, 30, 30, 2.0, (30,), (30,), (1.0,))
    report = make_report([sample(0, speculation=one), sample(1, speculation=two)], Goals())
    speculation = report["speculation"]
    assert (speculation["rounds"], speculation["accepted"]) == (40, 42)
    assert speculation["mean_accepted_length"] == pytest.approx((10 * 2.2 + 30 * 2.0) / 40)
    assert speculation["verified_by_position"] == [40, 10]
    assert speculation["accepted_share_by_position"] == pytest.approx([38 / 40, 4 / 10])


def test_nothing_at_all_can_be_reported() -> None:
    report = make_report([], Goals(ttft_s=1.0))
    assert report["goals"]["share"] is None and report["speculation"]["mean_accepted_length"] is None
    assert Counter(report["requests"].values()) == Counter({0: 6})
    assert command.warnings(report) == []
