"""Dashboard and autoscalers ask for metrics that a running server really has, by the labels that it gives them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.chart import DASHBOARD, ROOT, manifests, values_of
from tests.e2e import conftest as e2e

BOARD = json.loads(DASHBOARD.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = BOARD["panels"]
SELECTOR = re.compile(r"\b([a-z_][a-z0-9_]*)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
ADDED = {"instance", "job", "namespace", "pod"}  # by Prometheus
Series = tuple[str, dict[str, str]]


def expressions() -> Iterator[str]:
    for panel in PANELS:
        for target in panel.get("targets", []):
            if "expr" in target:
                yield target["expr"]
    for name in ("autoscaling", "hpa"):
        for manifest in manifests(values_of(name)):
            if manifest["kind"] == "ScaledObject":
                yield manifest["spec"]["triggers"][0]["metadata"]["query"]
            elif manifest["kind"] == "HorizontalPodAutoscaler":
                metric = manifest["spec"]["metrics"][0]["pods"]["metric"]
                labels = ",".join(f'{key}="{value}"' for key, value in metric["selector"]["matchLabels"].items())
                yield f"{metric['name']}{{{labels}}}"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Series]:
    """What a server exports after a generation with drafts: sample name, labels."""
    if not (ROOT / "server" / "telemetry").is_dir():
        pytest.skip("this version of the server exports no metrics")
    log = tmp_path_factory.mktemp("metrics") / "log"
    server = e2e.start(["--metrics-port", "0", "--policy", "threshold", "--threads", "1", "--cost-cache", ""], log)
    try:
        e2e.generate(server.address, "def add(a, b):", "--max-tokens", "24", "--ignore-eos")
        events = map(json.loads, log.read_text().splitlines())
        url = next(event["url"] for event in events if event["event"] == "metrics")
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    finally:
        assert server.stop() == 0
    found = []
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, labels = line.rpartition(" ")[0].partition("{")
            found.append((name, dict(re.findall(r'(\w+)="([^"]*)"', labels))))
    return found


def answers(name: str, matchers: list[tuple[str, str, str]], series: list[Series]) -> list[dict[str, str]]:
    """The labels of every series that a selector selects. A matcher with a variable of Grafana's matches all."""

    def fits(labels: dict[str, str]) -> bool:
        for label, operator, value in matchers:
            if label in ADDED or "$" in value:
                continue
            here = labels.get(label, "")
            same = here == value if operator in ("=", "!=") else re.fullmatch(value, here) is not None
            if same != (operator in ("=", "=~")):
                return False
        return True

    return [labels for found, labels in series if found == name and fits(labels)]


@pytest.mark.timeout(600)  # the first start on a machine compiles
def test_every_selector_selects_something(series: list[Series]) -> None:
    asked = 0
    for expression in expressions():
        for name, inside in SELECTOR.findall(expression):
            asked += 1
            selected = answers(name, MATCHER.findall(inside), series)
            assert selected, expression
            by = set(re.findall(r"by \((\w+)\)", expression))
            assert by <= selected[0].keys(), expression
            assert {label for label, _, _ in MATCHER.findall(inside)} <= selected[0].keys() | ADDED
    assert asked > 30


def test_every_metric_stands_in_a_selector() -> None:
    """So that the test above sees all of them, and the dashboard's choice of instances holds for all."""
    for expression in expressions():
        left = SELECTOR.sub("", expression)
        assert not re.search(r"\b(dspark|gen_ai|rpc)_\w+(?!\w*\))", re.sub(r"by \([^)]*\)", "", left)), expression
    for panel in PANELS:
        for target in panel.get("targets", []):
            for _, inside in SELECTOR.findall(target.get("expr", "")):
                assert 'instance=~"$instance"' in inside


def test_legends_name_labels_that_are_left() -> None:
    for panel in PANELS:
        for target in panel.get("targets", []):
            for label in re.findall(r"{{(\w+)}}", target.get("legendFormat", "")):
                assert f"by ({label})" in target["expr"]


def test_panels_have_names_of_their_own_and_lie_side_by_side() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [
        (x, y)
        for panel in PANELS
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    chosen = {variable["name"] for variable in BOARD["templating"]["list"] if variable["type"] == "datasource"}
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"].strip("${}") in chosen


@pytest.mark.skipif(not (ROOT / "server" / "telemetry").is_dir(), reason="this version of the server has no traces")
def test_traces_are_asked_for_by_attributes_that_spans_have() -> None:
    """README's table names every span and attribute; another test holds it to the server."""
    (query,) = [t["query"] for panel in PANELS for t in panel.get("targets", []) if "query" in t]
    readme = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
    assert "`text_completion {model}`" in readme and 'name =~ "text_completion .*"' in query
    for attribute in re.findall(r"span\.([\w.]+)", query):
        assert f"`{attribute}`" in readme
