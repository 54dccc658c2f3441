"""Renders the chart and validates what it makes: Kubernetes' own schemas, and ours for the custom resources."""

import json
import subprocess
import sys
from functools import cache
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/schoolhouse"
VARIANTS = ("cpu", "gpu")
VERSIONS = ("1.27", "1.37")  # of Kubernetes: the oldest that the chart says it takes, and the newest that has schemas
CUSTOM = json.loads((ROOT / "tests/project/schemas/custom.json").read_text())


def committed(variant):
    """The objects of the committed manifest."""
    return list(filter(None, yaml.safe_load_all((ROOT / f"deploy/kuberay/{variant}.yaml").read_text())))


def values(variant):
    """The values file of a variant."""
    return yaml.safe_load((CHART / f"values-{variant}.yaml").read_text())


def merged(given, changes):
    """These values with `changes` laid over them, as Helm lays values over values."""
    if not isinstance(given, dict) or not isinstance(changes, dict):
        return changes
    return {**given, **{key: merged(given.get(key), value) for key, value in changes.items()}}


def helm(*arguments):
    """Runs render.py; in a process of its own, since Helm is a Go library that takes over signals."""
    if subprocess.run([sys.executable, "-c", "import helm_python"], capture_output=True).returncode:
        pytest.skip("Helm (helm-python-sdk) is not installed")
    command = [sys.executable, ROOT / "deploy/render.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def rendered(given, folder):
    """The objects that the chart makes of these values."""
    (folder / "values.yaml").write_text(yaml.safe_dump(given))
    done = helm(folder / "values.yaml")
    assert done.returncode == 0, done.stderr
    return list(filter(None, yaml.safe_load_all(done.stdout)))


@cache
def _definitions(version):
    folder = resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{version}.0-local-strict"
    return Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))


def validate(item, version=VERSIONS[-1]):
    """Raises a ValidationError for an object that this Kubernetes, with KubeRay, would not take."""
    if item["kind"] in CUSTOM["$defs"]:
        schema = {**CUSTOM, "$ref": f"#/$defs/{item['kind']}"}
        jsonschema.Draft202012Validator(schema, registry=_definitions(version) @ Registry()).validate(item)
        return
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(item, version, strict=True)


def one(items, kind, name=""):
    """The only object of this kind whose name ends so."""
    (found,) = [item for item in items if item["kind"] == kind and item["metadata"]["name"].endswith(name)]
    return found


def pods(items):
    """The pod templates, by who makes the pod."""
    cluster = one(items, "RayCluster")["spec"]
    found = {"head": cluster["headGroupSpec"]["template"], "launcher": one(items, "Deployment")["spec"]["template"]}
    return found | {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}


def settings(items, folder):
    """The pool that the ConfigMap holds, as the server reads it; with a certificate of ours, where it names one."""
    from authority import ours
    from schoolhouse_server.pool.config import load_pool

    for name, path in (("tls.crt", "server.pem"), ("tls.key", "server-key.pem"), ("ca.crt", "ca.pem")):
        (folder / name).write_bytes((ours().folder / path).read_bytes())
    for name, text in one(items, "ConfigMap")["data"].items():
        (folder / name).write_text(text.replace("/etc/schoolhouse-tls", str(folder)))
    return load_pool(folder / "pool.yaml")
