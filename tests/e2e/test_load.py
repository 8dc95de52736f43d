"""Many calls on a real server: `python -m clients load`, and more at once than it can take up."""

from __future__ import annotations

import asyncio
import json
import signal

import grpc
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc

from tests.e2e.conftest import Process, client, generate


def test_a_run_leaves_a_report_and_an_idle_server(server: Process) -> None:
    mixes = ("--prompt-tokens", "5:1,40-80:1", "--max-tokens", "12:1,24:1", "--cancel", "0.4", "--ignore-eos")
    report = json.loads(client(server.address, "load", "--rate", "20", "--requests", "12", *mixes, "--json"))
    counts = report["requests"]
    assert counts["offered"] == 12 == counts["finished"] + counts["cancelled"]
    assert counts["cancelled"] > 0 and report["errors"] == {}
    assert report["finish_reasons"] == {"length": counts["finished"]}
    assert report["ttft_s"]["count"] == 12 and report["e2e_s"]["count"] == counts["finished"]
    assert report["tokens"]["prompt"] >= 12 * 5
    length = report["speculation"]["mean_accepted_length"]
    assert 1 <= length <= 1 + json.loads(client(server.address, "info", "--json"))["drafter"]["block_size"]
    # The streams that were hung up on are gone; the next request is alone.
    assert generate(server.address, "x", "--max-tokens", "4", "--ignore-eos")["usage"]["completion_tokens"] == 4
    load = json.loads(client(server.address, "info", "--json"))["load"]
    assert load["running"] == load["waiting"] == 0


async def test_calls_that_pile_up_are_all_answered(server: Process) -> None:
    """gRPC drops calls that its server has not taken up yet when there are many, as CANCELLED; ours takes them all."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = wire_grpc.GenerationServiceStub(channel)
        await stub.Tokenize(wire.TokenizeRequest(text="def"))
        server.popen.send_signal(signal.SIGSTOP)
        calls = [stub.Tokenize(wire.TokenizeRequest(text="def")) for _ in range(3500)]
        await asyncio.sleep(0.5)  # they lie in the server's socket before it goes on
        server.popen.send_signal(signal.SIGCONT)
        codes = [await call.code() for call in calls]
    assert set(codes) == {grpc.StatusCode.OK}
