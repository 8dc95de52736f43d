"""The stack of compose.yaml: its files name each other rightly, and its server is started as the server expects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.deploy.chart import ROOT
from tests.deploy.server_flags import unknown_flags, unknown_variables

DOCKER = ROOT / "docker"


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))


COMPOSE = load("compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVER = SERVICES["server"]
LISTENS = {  # service -> the ports on which its configuration, or its default, lets it listen
    "server": {50051, 9464},
    "collector": {4317, 13133},
    "traces": {4317, 3200},
    "prometheus": {9090},
    "grafana": {3000},
}


def flags(service: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in service["command"])}


def reachable(address: str) -> bool:
    """Whether `host:port` is where a service listens."""
    host, _, port = address.rpartition(":")
    return int(port) in LISTENS[host]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_locked_down(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert {int(port.rpartition(":")[2]) for port in service.get("ports", [])} <= LISTENS[name]
    if "build" not in service:
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])  # not one that moves


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (DOCKER / source).exists() and volume.endswith(":ro"), source
        else:
            assert source in COMPOSE["volumes"]


def test_the_server_is_built_from_here() -> None:
    build = SERVER["build"]
    context = (DOCKER / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).is_file()
    override = load("compose.cuda.yaml")["services"]["server"]
    assert override["build"]["args"] == {"VARIANT": "cuda"}
    (device,) = override["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_flags_and_variables_are_the_servers() -> None:
    variables = SERVER["environment"] | load("compose.cuda.yaml")["services"]["server"]["environment"]
    assert unknown_flags(flags(SERVER)) == set()
    assert unknown_variables(variables) == set()
    assert {"/tmp", "/cache:exec"} == set(SERVER["tmpfs"])


def test_there_is_time_to_drain() -> None:
    assert float(SERVER["stop_grace_period"].removesuffix("s")) >= float(flags(SERVER)["--drain-seconds"]) + 10


def test_traces_find_their_way() -> None:
    collector, tempo = load("observability/collector.yaml"), load("observability/tempo.yaml")
    assert reachable(urlsplit(SERVER["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]).netloc)
    assert collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    assert reachable(collector["exporters"]["otlp/traces"]["endpoint"])
    assert tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    for pipeline in collector["service"]["pipelines"].values():
        for part, names in pipeline.items():
            assert set(names) <= collector[part].keys()
        assert pipeline["processors"][0] == "memory_limiter"  # before anything that keeps spans
    assert set(collector["service"]["extensions"]) <= collector["extensions"].keys()


def test_what_tempo_writes_may_be_written() -> None:
    storage = load("observability/tempo.yaml")["storage"]["trace"]
    (writable,) = SERVICES["traces"]["tmpfs"]
    assert all(storage[part]["path"].startswith(f"{writable}/") for part in ("wal", "local"))


def test_metrics_find_their_way() -> None:
    config = load("observability/prometheus.yaml")
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets["dspark"] == [f"server:{flags(SERVER)['--metrics-port']}"] and reachable(targets["dspark"][0])
    assert flags(SERVER)["--listen"].startswith("0.0.0.0:")  # the metrics listen on the same host
    assert SERVER["environment"]["OTEL_METRICS_EXPORTER"] == "none"  # not twice


def test_grafana_is_provisioned() -> None:
    sources = load("observability/grafana/datasources/sources.yaml")["datasources"]
    assert {source["type"] for source in sources} == {"prometheus", "tempo"}
    assert all(reachable(urlsplit(source["url"]).netloc) for source in sources)
    mounted = dict(volume.split(":")[1::-1] for volume in SERVICES["grafana"]["volumes"])
    (provider,) = load("observability/grafana/dashboards/dashboards.yaml")["providers"]
    folder = DOCKER / mounted[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).is_file() and str(Path(home).parent) == provider["options"]["path"]
