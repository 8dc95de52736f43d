"""`python -m clients load` on a real server."""

from __future__ import annotations

import json

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
