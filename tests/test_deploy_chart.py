"""The Helm chart: what it makes is valid, fits together, and is what deploy/kuberay has."""

import re
import subprocess
from copy import deepcopy

import jsonschema
import pytest
import torch
import yaml
from schoolhouse_server.loading import load_teacher

pytest.importorskip("kubernetes_validate")
from manifests import (
    CHART,
    ROOT,
    VARIANTS,
    VERSIONS,
    committed,
    helm,
    merged,
    one,
    pods,
    rendered,
    settings,
    validate,
    values,
)

KINDS = {"ConfigMap", "CronJob", "Job", "NetworkPolicy", "PodDisruptionBudget", "RayCluster", "Service"}
ALL_ON = {
    "nameOverride": "teachers",
    "image": {"tag": "9", "pullSecrets": [{"name": "pull"}]},
    "files": {"my_models.py": "def make():\n    return None\n"},
    "models": {"existingClaim": "weights"},
    "pool": {"security": {"insecure": False}},
    "tls": {"secretName": "certificate", "mutual": True},
    "tokens": {"secretName": "tokens"},
    "head": {"nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}], "affinity": {"nodeAffinity": {}}},
    "autoscaling": {"enabled": True},
    "gcsFaultTolerance": {
        "enabled": True,
        "redisAddress": "redis:6379",
        "passwordSecret": {"name": "redis"},
        "externalStorageNamespace": "schoolhouse",
    },
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "tokenSecret": {"name": "admin"}},
    "networkPolicy": {
        "from": [{"namespaceSelector": {"matchLabels": {"team": "vision"}}}],
        "metricsFrom": [{"namespaceSelector": {}}],
    },
    "podAnnotations": {"a": "b"},
    "env": [{"name": "A", "value": "b"}],
}
ALL_OFF = {
    "launcher": {"keep": {"enabled": False, "schedule": "*/5 * * * *"}},
    "spread": {"enabled": False},
    "autoscaling": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "podDisruptionBudget": {"enabled": False},
}


def test_the_manifests_are_what_the_chart_makes():
    done = helm("--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_manifests_are_valid(variant, version):
    items = committed(variant)
    assert {item["kind"] for item in items} == KINDS
    for item in items:
        validate(item, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("changes", "kinds"),
    [(ALL_ON, KINDS | {"ServiceMonitor"}), (ALL_OFF, KINDS - {"CronJob", "NetworkPolicy", "PodDisruptionBudget"})],
    ids=["all on", "all off"],
)
def test_every_setting_makes_valid_objects(changes, kinds, version, tmp_path):
    items = rendered(merged(values("cpu"), changes), tmp_path)
    assert {item["kind"] for item in items} == kinds
    for item in items:
        validate(item, version)


@pytest.mark.parametrize(
    ("kind", "path", "right", "wrong"),
    [
        ("RayCluster", "spec", "headGroupSpec", "headGroupSpecs"),
        ("RayCluster", "spec.workerGroupSpecs.0", "maxReplicas", "maxReplica"),
        ("RayCluster", "spec.headGroupSpec.template.spec", "securityContext", "securityContexts"),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers.0", "volumeMounts", "mounts"),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers.0.lifecycle", "preStop", "prestop"),
        ("Job", "spec.template.spec", "restartPolicy", "restart"),
        ("CronJob", "spec", "jobTemplate", "job"),
        ("Service", "spec.ports.0", "targetPort", "target"),
        ("NetworkPolicy", "spec.ingress.3.ports.1", "endPort", "lastPort"),
        ("PodDisruptionBudget", "spec", "maxUnavailable", "unavailable"),
    ],
)
def test_a_misspelt_field_is_an_error(kind, path, right, wrong):
    item = deepcopy(one(committed("cpu"), kind))
    found = item
    for part in path.split("."):
        found = found[int(part) if part.isdigit() else part]
    found[wrong] = found.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        validate(item)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"worker_groups": []}, "worker_groups"),
        ({"pool": {"host": "127.0.0.1"}}, "host"),
        ({"pool": {"teachers": None}}, "teachers"),
        ({"gcsFaultTolerance": {"enabled": True}}, "redisAddress"),
        ({"pool": {"security": {"insecure": False}}}, "insecure"),  # neither TLS nor plaintext by name
        ({"tls": {"secretName": "certificate"}}, "insecure"),  # both
        ({"pool": {"http_port": 70000}}, "http_port"),
        ({"serviceMonitor": {"enabled": True}, "pool": {"http_port": None}}, "http_port"),
        ({"objectStore": {"bytes": 1}}, "bytes"),
        ({"networkPolicy": {"studentLabels": {"schoolhouse.student": None}}}, "studentLabels"),
    ],
)
def test_wrong_values_are_refused(changes, said, tmp_path):
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(merged(values("cpu"), changes)))
    done = helm(tmp_path / "values.yaml")
    assert done.returncode != 0
    assert said in done.stderr


def test_the_chart_alone_asks_for_teachers(tmp_path):
    (tmp_path / "values.yaml").write_text("{}")
    done = helm(tmp_path / "values.yaml")
    assert "teachers" in done.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pool_fits_its_workers(variant, tmp_path):
    items = committed(variant)
    pool = settings(items, tmp_path)
    assert pool.host == "0.0.0.0"  # a loopback address would be the pod's own
    (group,) = one(items, "RayCluster")["spec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    free = {"num_cpus": int(limits["cpu"]), "num_gpus": int(limits.get("nvidia.com/gpu", 0))}
    for resource, each in free.items():
        wanted = sum(spec.replicas * getattr(spec.resources, resource) for spec in pool.teachers.values())
        assert wanted <= group["replicas"] * each
        assert all(getattr(spec.resources, resource) <= each for spec in pool.teachers.values())
    assert one(items, "RayCluster")["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_tls_is_of_the_secret_that_is_mounted(tmp_path):
    items = committed("gpu")
    assert settings(items, tmp_path).tls is not None
    for name in ("head", "gpu"):
        spec = pods(items)[name]["spec"]
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "tls"]
        assert volume["secret"]["secretName"] == values("gpu")["tls"]["secretName"]
        assert volume["secret"]["defaultMode"] == 0o440  # the key is not for everyone
        assert {"name": "tls", "mountPath": "/etc/schoolhouse-tls", "readOnly": True} in spec["containers"][0][
            "volumeMounts"
        ]
    assert yaml.safe_load(one(items, "ConfigMap")["data"]["pool.yaml"])["security"] == {
        "tls": {"cert": "/etc/schoolhouse-tls/tls.crt", "key": "/etc/schoolhouse-tls/tls.key"}
    }
    changed = merged(values("cpu"), ALL_ON)
    security = yaml.safe_load(one(rendered(changed, tmp_path), "ConfigMap")["data"]["pool.yaml"])["security"]
    assert security["tls"]["client_ca"] == "/etc/schoolhouse-tls/ca.crt"
    assert security["tokens"] == "/etc/schoolhouse-tokens/tokens.yaml"
    assert settings(committed("cpu"), tmp_path).security.insecure  # by name, in the file of a first look


def test_the_replicas_of_the_cpu_pool_are_one_model(tmp_path):
    pool = settings(committed("cpu"), tmp_path)
    (spec,) = pool.teachers.values()
    assert spec.replicas == 2  # students refuse one that differs from the other
    first, second = (load_teacher(spec, pool.folder).state_dict() for _ in range(spec.replicas))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_service_leads_to_the_directory(variant, tmp_path):
    items = committed(variant)
    pool = settings(items, tmp_path)
    ports = [pool.port, pool.http_port]
    spec = one(items, "Service")["spec"]
    assert spec["selector"] == {"ray.io/cluster": "schoolhouse", "ray.io/node-type": "head"}  # KubeRay's labels
    opened = {p["name"]: p["containerPort"] for p in pods(items)["head"]["spec"]["containers"][0]["ports"]}
    assert [(p["port"], opened[p["targetPort"]]) for p in spec["ports"]] == [(port, port) for port in ports]


def admitted(items, peer):
    """The ports that the NetworkPolicy opens to a peer."""
    rules = one(items, "NetworkPolicy")["spec"]["ingress"]
    rules = [rule for rule in rules if peer in rule["from"]]
    return [(p["port"], p.get("endPort", p["port"])) for rule in rules for p in rule.get("ports", [])]


def test_students_reach_the_pool_and_not_ray(tmp_path):
    student = {"podSelector": {"matchLabels": {"schoolhouse.student": "true"}}}
    items = committed("cpu")
    pool = settings(items, tmp_path)
    replicas = (pool.replica_ports[0], pool.replica_ports[-1])
    assert admitted(items, student) == [(7070, 7070), replicas, (pool.http_port, pool.http_port)]
    anywhere = merged(values("cpu"), {"pool": {"ports": None, "http_port": None}})  # as Linux hands them out
    del anywhere["pool"]["ports"], anywhere["pool"]["http_port"]
    assert admitted(rendered(anywhere, tmp_path), student) == [(7070, 7070), (32768, 60999)]
    launcher = one(items, "Job")["spec"]["template"]["metadata"]["labels"]
    labels = {key: launcher[key] for key in ("app.kubernetes.io/instance", "app.kubernetes.io/component")}
    assert admitted(items, {"podSelector": {"matchLabels": labels}}) == [(8265, 8265)]
    for rule in one(items, "NetworkPolicy")["spec"]["ingress"]:
        assert rule["from"]  # an empty one would admit everyone


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_are_confined_and_complete(variant):
    for template in pods(committed(variant)).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert set(container["resources"]) == {"requests", "limits"}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
            stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            assert not stop or int(stop[-1].split("=")[1]) < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_launcher_names_what_there_is(variant):
    items = committed(variant)
    container = pods(items)["launcher"]["spec"]["containers"][0]
    cluster = one(items, "RayCluster")["metadata"]["name"]
    assert container["command"][3] == f"--address=http://{cluster}-head-svc:8265"  # KubeRay's Service of the head
    shell, flag, script = container["args"]
    assert subprocess.run([shell, "-n", flag, script], capture_output=True).returncode == 0
    mounts = pods(items)["head"]["spec"]["containers"][0]["volumeMounts"]
    assert "/etc/schoolhouse/pool.yaml" in script
    assert {"name": "pool", "mountPath": "/etc/schoolhouse", "readOnly": True} in mounts
    assert one(items, "ConfigMap")["data"]["digest"] in script
    kept = pods(items)["keep"]["spec"]["containers"][0]
    roll = re.search(r"schoolhouse roll /etc/schoolhouse/pool.yaml [^;]*", script).group()
    assert kept == {**container, "args": [shell, flag, script.replace(roll, "true")]}


def test_a_changed_pool_is_a_new_job(tmp_path):
    def name(changes):
        return one(rendered(merged(values("cpu"), changes), tmp_path), "Job")["metadata"]["name"]

    before = name({})
    assert name({"head": {"nodeSelector": {"a": "b"}}}) == before
    others = [name({"pool": {"port": 7071}}), name({"files": {"m.py": "x = 1"}}), name({"image": {"tag": "2"}})]
    assert len({before, *others}) == 4


def test_versions_agree():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()
    version = yaml.safe_load((CHART / "values.yaml").read_text())["rayVersion"]
    assert f"ARG RAY_VERSION={version}\n" in (ROOT / "deploy/docker/Dockerfile").read_text()
