"""Values that the chart refuses, and what it says of them."""

from __future__ import annotations

import json
import os
from typing import Any

import helm_python
import pytest
import yaml

from server import options
from tests.deploy.chart import CHART, SETS, manifests, values_of
from tests.deploy.server_flags import unknown_flags

SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
# The client has these as soon as the server speaks TLS.


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"replicas": -1}, "replicas"),
        ({"replicas": "two"}, "replicas"),
        ({"replica": 2}, "replica"),
        ({"server": {"flags": {"max-runing": 8}}}, "max-runing"),
        ({"server": {"flags": {"policy": "fastest"}}}, "policy"),
        ({"server": {"flags": {"listen": "0.0.0.0:1"}}}, "listen"),
        ({"ports": {"grpc": 80}}, "ports"),
        ({"ports": {"grpc": 9464}}, "each needs a number of its own"),
        ({"drain": {"seconds": -5}}, "seconds"),
        ({"drain": {"seconds": 60, "terminationGracePeriodSeconds": 60}}, "cuts draining short; give at least 80"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"gpu": {"count": 2}}, "count"),
        ({"podSecurity": {"user": 0}}, "user"),
        ({"podSecurity": {"privileged": True}}, "privileged"),
        ({"telemetry": {"otlp": {"sampleRatio": 2}}}, "sampleRatio"),
        ({"telemetry": {"otlp": {"endpoint": "collector:4317"}}}, "endpoint"),
        ({"telemetry": {"metrics": {"enabled": False, "podMonitor": {"enabled": True}}}}, "nothing to scrape"),
        ({"autoscaling": {"kind": "vpa"}}, "kind"),
        ({"autoscaling": {"kind": "hpa", "minReplicas": 5, "maxReplicas": 2}}, "less than minReplicas"),
        ({"autoscaling": {"kind": "hpa"}, "telemetry": {"metrics": {"enabled": False}}}, "needs telemetry.metrics"),
        ({"replicas": 2, "model": {"cache": {"enabled": True}}}, "several replicas cannot share"),
        ({"tls": {"clientCa": {"secretName": "ca"}}}, "needs tls.secretName"),
        ({"tls": {"secretName": "t", "clientCa": {"secretName": "ca"}}}, "probes need a certificate"),
        ({"auth": {"tokens": "s3cr3t"}}, "tokens"),
        ({"telemetry": {"metrics": {"dashboard": {"labels": {"grafana_dashboard": 1}}}}}, "grafana_dashboard"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        manifests(values)
    assert says in str(caught.value)


def test_the_schema_knows_every_default_and_no_more() -> None:
    """A key that only one of values.yaml and values.schema.json has is a mistake in the other."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

    def compare(value: Any, schema: dict[str, Any], where: str) -> None:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        if isinstance(value, dict) and schema.get("additionalProperties") is False and where != ".server.flags":
            assert value.keys() == schema["properties"].keys() - {"global"}, where
            for key, inner in value.items():
                compare(inner, schema["properties"][key], f"{where}.{key}")

    compare(defaults, SCHEMA, "")
    assert not SCHEMA["additionalProperties"]


def test_every_flag_is_one_of_the_servers() -> None:
    flags = {f"--{name}" for name in SCHEMA["properties"]["server"]["properties"]["flags"]["properties"]}
    for name in SETS:
        for manifest in manifests(values_of(name)):
            if manifest["kind"] == "Deployment":
                arguments = manifest["spec"]["template"]["spec"]["containers"][0]["args"]
                flags |= {argument.partition("=")[0] for argument in arguments}
    assert unknown_flags(flags) == set()


@pytest.mark.parametrize("name", SETS)
def test_the_server_understands_its_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (deployment,) = [each for each in manifests(values_of(name)) if each["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for variable in [variable for variable in os.environ if variable.startswith("DSPARK_")]:
        monkeypatch.delenv(variable)
    chosen = options.parse(container["args"])
    assert chosen.port == container["ports"][0]["containerPort"] and chosen.host == "0.0.0.0"
    assert chosen.drain_s == values_of(name).get("drain", {}).get("seconds", 60)
    assert chosen.engine.device == {"gpu": "cuda", "hpa": "auto"}.get(name, "cpu")
    if name == "gpu":
        assert (chosen.engine.kv_memory, chosen.engine.max_batch_tokens) == (8 * 2**30, 1_000_000)


def test_flags_of_the_schema_take_what_the_server_takes() -> None:
    properties = SCHEMA["properties"]["server"]["properties"]["flags"]["properties"]
    actions = options._parser()._option_string_actions
    for name, schema in properties.items():
        if "enum" in schema:
            assert tuple(schema["enum"]) == tuple(actions[f"--{name}"].choices or ())


def test_the_test_pod_and_probes_speak_to_programs_that_exist() -> None:
    from clients.arguments import build_parser
    from docker.health import _parser

    generate = build_parser()._subparsers._group_actions[0].choices["generate"]
    for name in SETS:
        for manifest in manifests(values_of(name)):
            if manifest["kind"] == "Pod":
                (container,) = manifest["spec"]["containers"]
                assert container["command"] == ["python", "-m", "clients", "generate"]
                flags = {argument.partition("=")[0] for argument in container["args"]}
                unknown = flags - set(generate._option_string_actions)
                assert not unknown
            elif manifest["kind"] == "Deployment":
                (container,) = manifest["spec"]["template"]["spec"]["containers"]
                probe = container["readinessProbe"].get("exec")
                if probe is not None:
                    assert probe["command"][:3] == ["python", "-m", "docker.health"]
                    _parser().parse_args(probe["command"][3:])
