"""Flags, environment and file: who wins, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import LoadError
from server import options, settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text('max_running = 5\nmax_queue = 6\nkv_memory = "64M"\npolicy = "fixed"\ndrain_seconds = 2.5\n')
    return path


def test_flag_over_environment_over_file_over_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_MAX_QUEUE", "7")
    monkeypatch.setenv("DSPARK_MAX_RUNNING", "8")
    chosen = options.parse(["--config", str(file), "--max-running", "9"])
    assert (chosen.engine.max_running, chosen.engine.max_queue, chosen.engine.policy) == (9, 7, "fixed")
    assert (chosen.engine.kv_memory, chosen.drain_s, chosen.engine.prefill_chunk) == (64 * 2**20, 2.5, 64)
    came_from = {name: setting["from"] for name, setting in chosen.settings.items()}
    assert came_from["max_running"] == "flag --max-running"
    assert came_from["max_queue"] == "environment DSPARK_MAX_QUEUE"
    assert came_from["policy"] == f"file {file}"
    assert came_from["prefill_chunk"] == "default"


def test_what_is_printed_is_everything_and_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_LISTEN", "127.0.0.1:0")
    chosen = options.parse(["--threads", "3"])
    flags = {action.dest for action in options._parser()._actions} - {"help"}
    assert set(chosen.settings) == flags
    values = {name: setting["value"] for name, setting in chosen.settings.items()}
    assert (values["threads"], values["listen"], values["model"]) == (3, "127.0.0.1:0", chosen.engine.model)
    assert values["kv_memory"] == chosen.engine.kv_memory


def test_the_environment_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CONFIG", str(file))
    assert options.parse([]).engine.max_running == 5


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("max_runing = 5", r"key 'max_runing'.*did you mean max_running"),
        ("max_running = 'many'", "key 'max_running': 'many' is not a whole number"),
        ("max_running = true", "key 'max_running': True is neither"),
        ("max_running = [1]", "key 'max_running'"),
        ("policy = 'clever'", "key 'policy': 'clever' is not one of plain, fixed"),
        ("confidence_threshold = 'x'", "key 'confidence_threshold': 'x' is not a number"),
        ("config = 'other.toml'", "key 'config'"),
        ("max_running =", "not TOML"),
    ],
)
def test_a_wrong_file_is_named(content: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(content)
    with pytest.raises(LoadError, match=named) as error:
        options.parse(["--config", str(path)])
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nowhere.*No such file"):
        options.parse(["--config", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("DSPARK_MAX_RUNING", "5", "did you mean DSPARK_MAX_RUNNING"),
        ("DSPARK_KV_MEMORY", "lots", "DSPARK_KV_MEMORY: 'lots' is not a size.*--kv-memory"),
        ("DSPARK_POLICY", "clever", "DSPARK_POLICY.*not one of"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(LoadError, match=named):
        options.parse([])


def test_variables_that_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kubernetes service called dspark, the client's token, and one that is set to nothing."""
    for name in ("DSPARK_SERVICE_HOST", "DSPARK_PORT", "DSPARK_PORT_50051_TCP_ADDR", "DSPARK_SERVICE_PORT_GRPC"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:50051")
    monkeypatch.setenv("DSPARK_TOKEN", "secret")
    monkeypatch.setenv("DSPARK_MAX_RUNNING", "")
    chosen = options.parse([])
    assert chosen.engine.max_running == 64
    assert "secret" not in str(chosen.settings)


def test_a_switch_is_true_or_false_everywhere(tmp_path: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    settings.add_config_flag(parser)
    parser.add_argument("--quiet", action="store_true")
    path = tmp_path / "c.toml"
    path.write_text("quiet = true")
    assert settings.read(parser, [], {})[0].quiet is False
    assert settings.read(parser, ["--quiet"], {})[0].quiet is True
    assert settings.read(parser, ["--config", str(path)], {})[0].quiet is True
    assert settings.read(parser, ["--config", str(path)], {"DSPARK_QUIET": "off"})[0].quiet is False
    with pytest.raises(LoadError, match="neither true nor false"):
        settings.read(parser, [], {"DSPARK_QUIET": "maybe"})
