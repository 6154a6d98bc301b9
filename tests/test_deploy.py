"""What `deploy/` holds is whole: names that refer to something, options that programs know, a template that renders."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
POOL = json.loads((ROOT / "deploy" / "kubernetes-pool.json").read_text())
NAME = {"type": "string", "minLength": 1}
QUANTITY = {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": "Job"},
        "spec": {
            "additionalProperties": False,
            "required": ["template"],
            "properties": {
                **{name: {"type": "integer"} for name in ("backoffLimit", "parallelism", "completions")},
                "ttlSecondsAfterFinished": {"type": "integer"},
                "template": {
                    "properties": {
                        "spec": {
                            "additionalProperties": False,
                            "required": ["containers", "restartPolicy"],
                            "properties": {
                                "restartPolicy": {"enum": ["Never", "OnFailure"]},
                                "serviceAccountName": NAME,
                                "volumes": {
                                    "items": {
                                        "additionalProperties": False,
                                        "required": ["name"],
                                        "minProperties": 2,
                                        "maxProperties": 2,
                                        "properties": {
                                            "name": NAME,
                                            "persistentVolumeClaim": {"required": ["claimName"]},
                                            "emptyDir": {"properties": {"medium": {"enum": ["", "Memory"]}}},
                                        },
                                    }
                                },
                                "containers": {
                                    "minItems": 1,
                                    "items": {
                                        "additionalProperties": False,
                                        "required": ["name", "image"],
                                        "properties": {
                                            **dict.fromkeys(("name", "image", "workingDir"), NAME),
                                            "imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
                                            "args": {},
                                            "env": {},
                                            "envFrom": {"items": {"required": ["secretRef"]}},
                                            "resources": {
                                                "additionalProperties": False,
                                                "properties": {"limits": QUANTITIES, "requests": QUANTITIES},
                                            },
                                            "volumeMounts": {
                                                "items": {
                                                    "additionalProperties": False,
                                                    "required": ["name", "mountPath"],
                                                    "properties": {"name": NAME, "mountPath": NAME, "subPath": NAME},
                                                }
                                            },
                                        },
                                    },
                                },
                            },
                        }
                    }
                },
            },
        },
    },
}
"""The part of Kubernetes' batch/v1 Job that the template uses: a misspelt field would be dropped by the cluster."""


def rendered(**values: Any) -> dict[str, Any]:
    """The job's manifest as Prefect renders it from the template and a deployment's own values."""
    from prefect.utilities.templating import apply_values

    properties = POOL["variables"]["properties"]
    defaults = {name: each["default"] for name, each in properties.items() if "default" in each}
    made = apply_values(POOL["job_configuration"], defaults | values)
    assert isinstance(made, dict)
    return dict(made["job_manifest"])


@pytest.mark.parametrize("values", [{}, {"gpus": 8, "memory_limit": "64Gi", "image": "registry/timesearch:1"}])
def test_the_kubernetes_template_renders_to_a_job(values: dict[str, Any]) -> None:
    schema = POOL["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    defaults = {name: each["default"] for name, each in schema["properties"].items() if "default" in each}
    jsonschema.validate(defaults | values, schema)
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(POOL["job_configuration"])))
    assert used == set(schema["properties"]), "each value is used, and each that is used has an entry"
    job = rendered(**values)
    jsonschema.validate(job, JOB)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == values.get("image", "timesearch")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == values.get("gpus", 0)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_compose_names_nothing_that_is_not_there() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"postgres", "store", "prefect", "mlflow", "worker"}
    for name, service in services.items():
        assert service["image"], name
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == ("service_healthy" if "healthcheck" in services[other] else "service_started")
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"], volume
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} listens to other machines"
        assert all(isinstance(value, str) for value in service.get("environment", {}).values())
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == set(re.findall(r"\$\{(\w+)", text)), "a secret without which nothing starts"
    for host, port in re.findall(r"(?:http://|@)([a-z]+):(\d+)", text):
        assert host in services, f"{host}:{port}"


def test_the_image_is_made_of_what_the_checkout_has() -> None:
    recipe = (ROOT / "deploy" / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for group in re.findall(r"-group (\w+)", recipe):
        assert group in project["dependency-groups"]
    for extra in re.findall(r"(?:--extra |VLLM=)([\w-]+)", recipe):
        assert extra in project["project"]["optional-dependencies"]
    (made_by,) = set(re.findall(r"uv==(\S+)", recipe))
    assert f"uv=={made_by}" in (ROOT / "Makefile").read_text()
    assert COMPOSE["services"]["worker"]["build"]["dockerfile"] == "deploy/Dockerfile"
    (folder,) = re.findall(r"WORKDIR (\S+)", recipe)
    mounts = [volume.partition(":")[2] for volume in COMPOSE["services"]["worker"]["volumes"]]
    assert all(mount.startswith(f"{folder}/") for mount in mounts)
    kept = POOL["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert set(mounts) == {mount["mountPath"] for mount in kept if mount["name"] == "kept"}
