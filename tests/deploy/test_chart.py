"""What the chart makes: valid manifests, and pods that start, drain and end as an operator expects."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from server.service import SERVICE_NAME
from tests.deploy.chart import (
    DASHBOARD,
    NAMESPACE,
    SETS,
    VERSIONS,
    Manifest,
    findings,
    manifests,
    problem,
    render,
    values_of,
)

RENDERED = {name: manifests(values_of(name)) for name in SETS}


def only(made: list[Manifest], kind: str) -> Manifest:
    (found,) = [each for each in made if each["kind"] == kind]
    return found


def pod_of(made: list[Manifest]) -> dict[str, Any]:
    return only(made, "Deployment")["spec"]["template"]["spec"]


def server_of(made: list[Manifest]) -> dict[str, Any]:
    (container,) = pod_of(made)["containers"]
    return container


def kinds(name: str) -> set[str]:
    return {each["kind"] for each in RENDERED[name]}


@pytest.mark.parametrize("name", SETS)
def test_lint_and_schemas_are_content(name: str) -> None:
    assert findings(values_of(name)) == []
    for version in VERSIONS:
        assert [text for each in RENDERED[name] if (text := problem(each, version)) is not None] == []


def test_the_validation_sees_mistakes() -> None:
    made = copy.deepcopy(RENDERED["autoscaling"])
    server_of(made)["readynessProbe"] = {}
    only(made, "ScaledObject")["spec"]["triggers"][0]["metadata"]["threshold"] = 8
    assert len([each for each in made if problem(each, VERSIONS[-1]) is not None]) == 2


@pytest.mark.parametrize("name", SETS)
def test_every_pod_meets_the_restricted_standard(name: str) -> None:
    """Kubernetes' Pod Security Standard `restricted`, and a read-only root on top."""
    pods = [pod_of(RENDERED[name]), only(RENDERED[name], "Pod")["spec"]]
    for pod in pods:
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all({"emptyDir", "persistentVolumeClaim", "secret"} & volume.keys() for volume in pod["volumes"])
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in security or security["privileged"] is False
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", SETS)
def test_there_is_time_to_drain(name: str) -> None:
    pod, container = pod_of(RENDERED[name]), server_of(RENDERED[name])
    waits = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    drains = next(int(flag.split("=")[1]) for flag in container["args"] if flag.startswith("--drain-seconds="))
    assert pod["terminationGracePeriodSeconds"] >= waits + drains + 10


@pytest.mark.parametrize("name", SETS)
def test_probes_ask_the_service_that_is_served(name: str) -> None:
    container = server_of(RENDERED[name])
    port = next(port["containerPort"] for port in container["ports"] if port["name"] == "grpc")
    for kind, service in (("startupProbe", SERVICE_NAME), ("readinessProbe", SERVICE_NAME), ("livenessProbe", "")):
        probe = container[kind]
        if "exec" in probe:
            assert {f"--service={service}", f"--server=127.0.0.1:{port}"} <= set(probe["exec"]["command"])
            assert f"--timeout={probe['timeoutSeconds']}" in probe["exec"]["command"]
        elif "tcpSocket" in probe:
            assert (kind, probe["tcpSocket"]) == ("livenessProbe", {"port": port})
        else:
            assert probe["grpc"] == {"port": port, "service": service}
    assert ("exec" in container["readinessProbe"]) == (name == "tls-auth")


@pytest.mark.parametrize("name", SETS)
def test_ports_and_selectors_agree(name: str) -> None:
    made = RENDERED[name]
    deployment, container = only(made, "Deployment"), server_of(made)
    names = {port["name"]: port["containerPort"] for port in container["ports"]}
    listen = next(flag for flag in container["args"] if flag.startswith("--listen="))
    assert listen == f"--listen=0.0.0.0:{names['grpc']}"
    assert ("metrics" in names) == any(f == f"--metrics-port={names.get('metrics')}" for f in container["args"])
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [deployment["spec"]["selector"]["matchLabels"]]
    for each in made:
        if each["kind"] == "Service":
            selectors.append(each["spec"]["selector"])
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= names.keys()
        elif each["kind"] == "PodMonitor":
            selectors.append(each["spec"]["selector"]["matchLabels"])
            assert {endpoint["port"] for endpoint in each["spec"]["podMetricsEndpoints"]} <= names.keys()
        elif each["kind"] == "NetworkPolicy":
            selectors.append(each["spec"]["podSelector"]["matchLabels"])
            assert {port["port"] for rule in each["spec"]["ingress"] for port in rule["ports"]} <= names.keys()
        elif each["kind"] == "PodDisruptionBudget":
            selectors.append(each["spec"]["selector"]["matchLabels"])
        elif each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            assert each["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert all(selector.items() <= labels.items() for selector in selectors)
    test_labels = only(made, "Pod")["metadata"]["labels"]
    assert not any(selector.items() <= test_labels.items() for selector in selectors)
    assert {each["metadata"]["namespace"] for each in made} == {NAMESPACE}


def test_headless_service_names_every_pod() -> None:
    services = [each["spec"] for each in RENDERED["defaults"] if each["kind"] == "Service"]
    assert [service.get("clusterIP") for service in services] == [None, "None"]
    assert {service["ports"][0]["appProtocol"] for service in services} == {"kubernetes.io/h2c"}


def test_a_gpu_is_asked_for_and_its_nodes_are_tolerated() -> None:
    pod, container = pod_of(RENDERED["gpu"]), server_of(RENDERED["gpu"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 1
    assert container["image"].endswith("-cuda") and "--device=cuda" in container["args"]
    assert {toleration["key"] for toleration in pod["tolerations"]} == {"nvidia.com/gpu", "dedicated"}
    assert "--max-batch-tokens=1000000" in container["args"]  # not 1e+06
    assert only(RENDERED["gpu"], "Deployment")["spec"]["strategy"] == {"type": "Recreate"}  # its claim is one node's


def test_without_a_gpu_it_serves_on_processors() -> None:
    container = server_of(RENDERED["defaults"])
    assert "--device=cpu" in container["args"] and "nvidia.com/gpu" not in container["resources"]["limits"]
    assert "--device=auto" in server_of(RENDERED["hpa"])["args"]
    for name in SETS:
        asked = "nvidia.com/gpu" in server_of(RENDERED[name])["resources"]["limits"]
        shown = [each["value"] for each in server_of(RENDERED[name])["env"] if each["name"] == "NVIDIA_VISIBLE_DEVICES"]
        assert shown == ([] if asked else ["void"])


def test_autoscalers_own_the_number_of_replicas() -> None:
    for name in SETS:
        scaled = kinds(name) & {"HorizontalPodAutoscaler", "ScaledObject"}
        assert ("replicas" in only(RENDERED[name], "Deployment")["spec"]) == (not scaled)
    metric = only(RENDERED["hpa"], "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]
    assert metric == {"name": "dspark_requests", "selector": {"matchLabels": {"dspark_state": "waiting"}}}
    query = only(RENDERED["autoscaling"], "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
    assert query == 'sum(dspark_requests{dspark_state="waiting",namespace="prod",pod=~"demo-dspark-.*"})'


def test_secrets_are_mounted_and_never_written_down() -> None:
    container, text = server_of(RENDERED["tls-auth"]), str(RENDERED["tls-auth"])
    assert "Secret" not in kinds("tls-auth") and "stringData" not in text
    mounted = {mount["mountPath"] for mount in container["volumeMounts"] if mount.get("readOnly")}
    for flag in ("tls-cert", "tls-key", "tls-client-ca", "auth-tokens"):
        (path,) = [given.split("=")[1] for given in container["args"] if given.startswith(f"--{flag}=")]
        assert any(path.startswith(f"{folder}/") for folder in mounted)
    variables = {variable["name"]: variable for variable in container["env"]}
    assert "secretKeyRef" in variables["OTEL_EXPORTER_OTLP_HEADERS"]["valueFrom"]
    test = only(RENDERED["tls-auth"], "Pod")["spec"]
    (tls,) = [volume["secret"] for volume in test["volumes"] if volume["name"] == "tls"]
    assert [item["key"] for item in tls["items"]] == ["tls.crt"]  # clients need no key of the server's


def test_telemetry_is_wired_by_the_standard_variables() -> None:
    variables = {variable["name"]: variable.get("value") for variable in server_of(RENDERED["gpu"])["env"]}
    assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.observability:4317"
    assert variables["OTEL_EXPORTER_OTLP_PROTOCOL"] == "grpc"
    assert (variables["OTEL_TRACES_SAMPLER"], variables["OTEL_TRACES_SAMPLER_ARG"]) == (
        "parentbased_traceidratio",
        "0.1",
    )
    assert "deployment.environment.name=production" in variables["OTEL_RESOURCE_ATTRIBUTES"]
    order = list(variables)  # Kubernetes expands $(NAME) of variables that stand above only
    assert order.index("K8S_POD_NAME") < order.index("OTEL_RESOURCE_ATTRIBUTES")
    assert not any(
        variable.startswith("OTEL_") for variable in (v["name"] for v in server_of(RENDERED["defaults"])["env"])
    )


def test_the_network_policy_opens_what_is_used() -> None:
    policy = only(RENDERED["tls-auth"], "NetworkPolicy")["spec"]
    grpc, metrics = policy["ingress"]
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "web"}}} in grpc["from"]
    test = only(RENDERED["tls-auth"], "Pod")["metadata"]["labels"]
    assert any(peer.get("podSelector", {}).get("matchLabels") == test for peer in grpc["from"])
    assert [port["port"] for port in metrics["ports"]] == ["metrics"]
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [53, 53, 4317]
    assert "NetworkPolicy" not in kinds("cpu-minimal")


def test_the_dashboard_travels_as_it_is() -> None:
    board = only(RENDERED["gpu"], "ConfigMap")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert board["data"]["dspark.json"].strip() == DASHBOARD.read_text(encoding="utf-8").strip()
    assert "ConfigMap" not in kinds("defaults")


def test_the_claim_is_made_kept_or_taken() -> None:
    claim = only(RENDERED["gpu"], "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (models,) = [volume for volume in pod_of(RENDERED["gpu"])["volumes"] if volume["name"] == "models"]
    assert models["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    taken = manifests({"replicas": 3, "model": {"cache": {"enabled": True, "existingClaim": "weights"}}})
    assert not any(each["kind"] == "PersistentVolumeClaim" for each in taken)


def test_a_second_release_shares_no_name_and_no_pod() -> None:
    first, second = RENDERED["defaults"], manifests({}, release="other")
    assert not {(m["kind"], m["metadata"]["name"]) for m in first} & {
        (m["kind"], m["metadata"]["name"]) for m in second
    }
    labels = only(second, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert not only(first, "Deployment")["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_notes_teach_how_to_call() -> None:
    notes = render(values_of("tls-auth"))["NOTES.txt"]
    assert "port-forward service/demo-dspark 50051" in notes
    assert "--tls-ca ca.crt --server-name dspark.example.com --tls-cert my.crt --tls-key my.key" in notes
    assert "--token-file token" in notes
    assert "Everybody who reaches the port may call" not in notes
    assert "Everybody who reaches the port may call" in render({})["NOTES.txt"]
