"""The chart as tests and `make chart` see it: `python -m tests.deploy.chart [--write DIR]`.

Lints and renders it with the defaults and with every value set under ci/, and validates each manifest: Kubernetes'
own kinds against its schemas, those of operators against what their documentation says of the fields used here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "docker" / "helm" / "dspark"
DASHBOARD = CHART / "dashboards" / "dspark.json"
SETS = {"defaults": None, **{path.stem: path for path in sorted((CHART / "ci").glob("*.yaml"))}}
VERSIONS = ("1.30", "1.37")  # the oldest that Chart.yaml allows, the newest with a schema here
NAMESPACE, RELEASE = "prod", "demo"
Manifest = dict[str, Any]


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_TEXT, _COUNT, _FREE = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}
_META = {"apiVersion": _TEXT, "kind": _TEXT, "metadata": _FREE}
OPERATORS = {  # kinds without a schema in Kubernetes: PodMonitor of the Prometheus operator, ScaledObject of KEDA
    "PodMonitor": _object(
        _META
        | {
            "spec": _object(
                {
                    "selector": _object({"matchLabels": _FREE}),
                    "podMetricsEndpoints": {
                        "type": "array",
                        "items": _object({"port": _TEXT, "path": _TEXT, "interval": _TEXT}, "port"),
                    },
                },
                "selector",
                "podMetricsEndpoints",
            )
        },
        "spec",
    ),
    "ScaledObject": _object(
        _META
        | {
            "spec": _object(
                {
                    "scaleTargetRef": _object({"name": _TEXT}, "name"),
                    "minReplicaCount": _COUNT,
                    "maxReplicaCount": _COUNT,
                    "pollingInterval": _COUNT,
                    "cooldownPeriod": _COUNT,
                    "fallback": _object({"failureThreshold": _COUNT, "replicas": _COUNT, "behavior": _TEXT}),
                    "advanced": _object({"horizontalPodAutoscalerConfig": _object({"behavior": _FREE})}),
                    "triggers": {
                        "type": "array",
                        "items": _object(
                            {
                                "type": {"const": "prometheus"},
                                "metricType": {"enum": ["AverageValue", "Value"]},
                                # KEDA takes texts only, numbers too.
                                "metadata": _object(
                                    {"serverAddress": _TEXT, "query": _TEXT, "threshold": _TEXT},
                                    "serverAddress",
                                    "query",
                                    "threshold",
                                ),
                            },
                            "type",
                            "metadata",
                        ),
                    },
                },
                "scaleTargetRef",
                "triggers",
            )
        },
        "spec",
    ),
}


def values_of(name: str) -> dict[str, Any]:
    """The value set of this name."""
    path = SETS[name]
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path is not None else {}


def render(values: Mapping[str, Any], release: str = RELEASE) -> dict[str, str]:
    """Template -> what Helm makes of it.

    Raises:
        helm_python.HelmError: values that the schema or a template refuses.
    """
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        texts = chart.render(dict(values), name=release, namespace=NAMESPACE)
    return {path.removeprefix("dspark/templates/"): text for path, text in texts.items()}


def manifests(values: Mapping[str, Any], release: str = RELEASE) -> list[Manifest]:
    """Every object that Helm would create, hooks too."""
    texts = (text for path, text in render(values, release).items() if not path.endswith(".txt"))
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest is not None]


def problem(manifest: Manifest, version: str) -> str | None:
    """What is wrong with a manifest, in words; unknown fields count."""
    where = f"{manifest['kind']} {manifest['metadata']['name']}"
    try:
        if manifest["kind"] in OPERATORS:
            jsonschema.validate(manifest, OPERATORS[manifest["kind"]])
        else:
            kubernetes_validate.validate(manifest, version, strict=True)
    except jsonschema.ValidationError as error:  # Kubernetes' errors are of this kind too
        return f"{where}: {'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"{where}: {error.message}"
    return None


def findings(values: Mapping[str, Any]) -> list[str]:
    """What `helm lint --strict` minds, less that a chart should have a picture."""
    messages = helm_python.lint(CHART, dict(values), strict=True, namespace=NAMESPACE)["messages"]
    return [f"{found['path']}: {found['error']}" for found in messages if found["error"] != "icon is recommended"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make chart", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the manifests there, a file a value set")
    given = parser.parse_args(arguments)
    wrong = 0
    for name in SETS:
        values = values_of(name)
        made = manifests(values)
        found = findings(values) + [text for each in made if (text := problem(each, VERSIONS[-1])) is not None]
        wrong += len(found)
        print("\n  ".join([f"{name}: {len(made)} manifests, {'in order' if not found else 'not in order:'}", *found]))
        if given.write is not None:
            given.write.mkdir(parents=True, exist_ok=True)
            (given.write / f"{name}.yaml").write_text(yaml.safe_dump_all(made, sort_keys=False))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
