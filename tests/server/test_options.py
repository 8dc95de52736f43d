"""The command line, and what the machine allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import limits
from engine.errors import LoadError
from server import options
from server.address import probe_address


def test_the_embedded_model_brings_its_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options.parse([])
    assert chosen.engine.model.endswith("engine/demo/target")
    assert chosen.engine.draft.endswith("engine/demo/dspark")
    assert (chosen.host, chosen.port) == ("127.0.0.1", 50051)
    assert chosen.engine.threads == limits.cores()
    assert options.parse(["--draft", "none"]).engine.draft == "none"


def test_another_model_has_no_drafter_unless_told() -> None:
    assert options.parse(["--model", "some/where"]).engine.draft == "none"
    assert options.parse(["--model", "some/where", "--draft", "else"]).engine.draft == "else"


def test_sizes_and_addresses() -> None:
    chosen = options.parse(["--kv-memory", "512M", "--listen", "[::1]:0", "--threads", "3", "--max-model-len", "99"])
    assert (chosen.engine.kv_memory, chosen.host, chosen.port) == (512 * 2**20, "[::1]", 0)
    assert (chosen.engine.threads, chosen.engine.max_model_len) == (3, 99)
    assert options.parse(["--kv-memory", "1.5GiB"]).engine.kv_memory == 3 * 2**29


def test_copying_can_be_forbidden() -> None:
    assert options.parse([]).engine.lookup
    chosen = options.parse(["--lookup", "never"])
    assert not chosen.engine.lookup and chosen.settings["lookup"] == {"value": "never", "from": "flag --lookup"}


def test_graphs_can_be_forbidden() -> None:
    assert options.parse([]).engine.cuda_graphs
    chosen = options.parse(["--cuda-graphs", "never"])
    assert not chosen.engine.cuda_graphs
    assert chosen.settings["cuda_graphs"] == {"value": "never", "from": "flag --cuda-graphs"}


@pytest.mark.parametrize(
    "line",
    [
        "--lookup on",
        "--cuda-graphs always",
        "--kv-memory lots",
        "--kv-memory 0",
        "--listen nowhere",
        "--listen localhost:99999",
        "--threads 0",
        "--max-running -1",
        "--policy clever",
        "--dtype int3",
        "--unknown",
    ],
)
def test_a_wrong_line_ends_with_code_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        options.parse(line.split())
    assert end.value.code == 2
    assert line.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3", "mtp"])
def test_a_kind_of_drafter_names_the_embedded_one(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "DEMO", tmp_path)
    with pytest.raises(LoadError, match=f"--draft {kind}: no such drafter is embedded"):
        options.parse(["--draft", kind])
    (tmp_path / kind).mkdir()
    assert options.parse(["--draft", kind]).engine.draft == str(tmp_path / kind)


@pytest.mark.parametrize("line", ["--confidence-threshold 2"])
def test_what_cannot_be_served_is_said(line: str) -> None:
    with pytest.raises(LoadError):
        options.parse(line.split())


def test_a_port_in_use_is_found_before_loading() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LoadError, match="choose another port"):
            probe_address("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(LoadError, match="--listen"):
        probe_address("no-such-host.invalid", 1)


def test_where_the_scheduler_is_steered_from() -> None:
    assert options.parse([]).admin is options.Admin.SHARED
    assert options.parse(["--admin-listen", "off"]).admin is options.Admin.OFF
    assert options.parse(["--admin-listen", "10.0.0.1:7001"]).admin == ("10.0.0.1", 7001)
