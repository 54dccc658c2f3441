"""The Helm chart: what it makes is valid, fits together, and is what deploy/kuberay has."""

import os
import subprocess
from copy import deepcopy
from dataclasses import replace

import jsonschema
import pytest
import torch
import yaml
from schoolhouse_server.pool import launcher
from schoolhouse_server.pool.loading import load_teacher

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

KINDS = {"ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "RayCluster", "Service"}
ALL_ON = {
    "nameOverride": "teachers",
    "image": {"tag": "9", "pullSecrets": [{"name": "pull"}]},
    "files": {"my_models.py": "def make():\n    return None\n"},
    "models": {"existingClaim": "weights"},
    "pool": {"security": {"insecure": False}},
    "tls": {"secretName": "certificate", "mutual": True},
    "tokens": {"secretName": "tokens"},
    "authentication": {"secretName": "ray-token"},
    "serviceAccount": {"create": True, "name": "teachers", "annotations": {"cloud.example/role": "reader"}},
    "head": {
        "nodeSelector": {"a": "b"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "runtimeClassName": "runc",
        "labels": {"ray.io/availability-zone": "a"},
    },
    "workerGroups": [
        {
            "name": "gpu",
            "replicas": 4,
            "minReplicas": 4,
            "maxReplicas": 4,
            "minAvailable": 2,
            "checkpointGiB": 140,
            "resources": {"requests": {"cpu": "8"}, "limits": {"cpu": "8"}},
            "runtimeClassName": "nvidia",
            "labels": {"ray.io/availability-zone": "b"},
        },
        {
            "name": "one",
            "replicas": 1,
            "minReplicas": 1,
            "maxReplicas": 1,
            "resources": {"requests": {"memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        },
    ],
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
    "authentication": {"enabled": False},
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
    [
        (ALL_ON, KINDS | {"ServiceAccount", "ServiceMonitor"}),
        (ALL_OFF, KINDS - {"NetworkPolicy", "PodDisruptionBudget"}),
    ],
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
        ("RayCluster", "spec.authOptions", "mode", "modes"),
        ("Deployment", "spec", "template", "jobTemplate"),
        ("Service", "spec.ports.0", "targetPort", "target"),
        ("NetworkPolicy", "spec.ingress.3.ports.1", "endPort", "lastPort"),
        ("PodDisruptionBudget", "spec", "minAvailable", "available"),
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
        ({"podDisruptionBudget": {"maxUnavailable": 1}}, "maxUnavailable"),
        ({"serviceAccount": {"create": True}}, "serviceAccount.name"),
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
    spec = replace(spec, threads=None)  # this process keeps its own
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
    launcher = pods(items)["launcher"]["metadata"]["labels"]
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
    digest = one(items, "ConfigMap")["data"]["digest"]
    assert container["command"][:3] == ["python", "-m", launcher.__name__]
    options = dict(option[2:].split("=") for option in container["command"][3:-1])
    assert options.pop("address") == f"http://{cluster}-head-svc:8265"  # KubeRay's Service of the head
    assert options == {"prefix": f"{cluster}-", "state": digest, "attempts": "12", "ready-file": "/tmp/launched"}
    assert container["readinessProbe"]["exec"]["command"] == ["test", "-e", options["ready-file"]]
    shell, flag, script = container["args"]
    assert subprocess.run([shell, "-n", flag, script], capture_output=True).returncode == 0
    mounts = pods(items)["head"]["spec"]["containers"][0]["volumeMounts"]
    assert "/etc/schoolhouse/pool.yaml" in script
    assert {"name": "pool", "mountPath": "/etc/schoolhouse", "readOnly": True} in mounts
    assert digest in script


@pytest.mark.parametrize(("running", "done"), [(True, "roll"), (False, "up")])
def test_the_launched_job_starts_a_pool_or_rolls_it(running, done, tmp_path):
    shell, flag, script = pods(committed("cpu"))["launcher"]["spec"]["containers"][0]["args"]
    for name, text in (
        ("grep", "exit 0"),
        ("schoolhouse", f"echo $* >> {tmp_path}/calls; test $1 != status || {running!s}"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text.replace('True', 'true').replace('False', 'false')}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run([shell, flag, script], env=environment, timeout=30).returncode == 0
    assert (tmp_path / "calls").read_text().splitlines() == [
        "status --address auto",
        f"{done} /etc/schoolhouse/pool.yaml --address auto --timeout-s 1800",
    ]


def test_nothing_makes_a_driver_now_and_then():
    for variant in VARIANTS:
        assert not {"CronJob", "Job"} & {item["kind"] for item in committed(variant)}


def test_a_changed_pool_is_launched_anew(tmp_path):
    def state(changes):
        command = pods(rendered(merged(values("cpu"), changes), tmp_path))["launcher"]["spec"]["containers"][0][
            "command"
        ]
        return next(option for option in command if option.startswith("--state="))

    before = state({})
    assert state({"head": {"nodeSelector": {"a": "b"}}}) == before
    others = [state({"pool": {"port": 7071}}), state({"files": {"m.py": "x = 1"}}), state({"image": {"tag": "2"}})]
    assert len({before, *others}) == 4


def budgets(items):
    """The PodDisruptionBudgets, by the group of workers that they are of."""
    found = [item["spec"] for item in items if item["kind"] == "PodDisruptionBudget"]
    return {spec["selector"]["matchLabels"]["ray.io/group"]: spec for spec in found}


def test_a_machine_can_be_emptied(tmp_path):
    """For pods of an owner without `scale` Kubernetes counts `minAvailable` in pods; else it evicts none."""
    changed = rendered(merged(values("cpu"), ALL_ON), tmp_path)
    assert {group: spec["minAvailable"] for group, spec in budgets(changed).items()} == {"gpu": 2}  # none of one worker
    for items in (committed("cpu"), committed("gpu"), changed):
        for group in one(items, "RayCluster")["spec"]["workerGroupSpecs"]:
            spec = budgets(items).get(group["groupName"], {"minAvailable": 0})
            assert "maxUnavailable" not in spec
            assert type(spec["minAvailable"]) is int
            assert spec["minAvailable"] < group["minReplicas"]
            assert spec.get("unhealthyPodEvictionPolicy", "AlwaysAllow") == "AlwaysAllow"


def test_ray_asks_for_its_token(tmp_path):
    def environment(template):
        return {one["name"]: one.get("value", one.get("valueFrom")) for one in template["spec"]["containers"][0]["env"]}

    def secret(name):
        return {"secretKeyRef": {"name": name, "key": "auth_token"}}

    for items, options, name in (
        (committed("gpu"), {"mode": "token"}, "schoolhouse"),  # KubeRay's, which has the cluster's name
        (rendered(merged(values("cpu"), ALL_ON), tmp_path), {"mode": "token", "secretName": "ray-token"}, "ray-token"),
    ):
        assert one(items, "RayCluster")["spec"]["authOptions"] == options
        for template in pods(items).values():
            found = environment(template)
            assert (found["RAY_AUTH_MODE"], found["RAY_AUTH_TOKEN"]) == ("token", secret(name))
    off = rendered(merged(values("cpu"), ALL_OFF), tmp_path)
    assert one(off, "RayCluster")["spec"]["authOptions"] == {"mode": "disabled"}
    for template in pods(off).values():
        assert environment(template)["RAY_AUTH_MODE"] == "disabled"
        assert "RAY_AUTH_TOKEN" not in environment(template)


def test_pods_have_their_runtime_their_account_and_their_labels(tmp_path):
    items = rendered(merged(values("cpu"), ALL_ON), tmp_path)
    cluster, specs = one(items, "RayCluster")["spec"], {name: pod["spec"] for name, pod in pods(items).items()}
    assert {name: spec.get("runtimeClassName") for name, spec in specs.items()} == {
        "head": "runc", "launcher": None, "gpu": "nvidia", "one": None
    }  # fmt: skip
    assert {spec["serviceAccountName"] for spec in specs.values()} == {"teachers"}
    account = one(items, "ServiceAccount")["metadata"]
    assert (account["name"], account["annotations"]) == ("teachers", {"cloud.example/role": "reader"})
    assert cluster["headGroupSpec"]["labels"] == {"ray.io/availability-zone": "a"}
    assert [group.get("labels") for group in cluster["workerGroupSpecs"]] == [{"ray.io/availability-zone": "b"}, None]


def test_memory_follows_the_checkpoint(tmp_path):
    specs = {name: pod["spec"] for name, pod in pods(rendered(merged(values("cpu"), ALL_ON), tmp_path)).items()}
    for name, memory in (("gpu", "148Gi"), ("one", "4Gi")):
        resources = specs[name]["containers"][0]["resources"]
        assert {resources[kind]["memory"] for kind in ("requests", "limits")} == {memory}


def test_versions_agree():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()
    version = yaml.safe_load((CHART / "values.yaml").read_text())["rayVersion"]
    assert f"ray[default]=={version}\n" in (ROOT / "deploy/locks/server.in").read_text()
