"""A pool that is watched: charts and metrics on the directory, metrics on replicas, logs with their names."""

import json

import pytest
import schoolhouse as sh
from loads import fetch
from prometheus_client.parser import text_string_to_metric_families
from schoolhouse_server.pool.config import load_pool

pytest.importorskip("ray")

POOL = """
port: 0
http_port: 0
metrics_ports: 18300-18399
log_format: json
teachers: {net: {build: "models:Net", kwargs: {width: 32, seed: 1}, threads: 1, resources: {num_cpus: 0.1}}}
"""


@pytest.fixture
def pool(cluster, tmp_path):
    from schoolhouse_server.pool.driver import launch

    (tmp_path / "pool.yaml").write_text(POOL)
    found = launch(load_pool(tmp_path / "pool.yaml"))
    try:
        found.wait(120)
        yield found
    finally:
        found.down()


@pytest.mark.ray
def test_a_watched_pool(pool, x):
    with sh.connect(pool.url("net"), job="exp") as teacher:
        teacher.submit((x,), {}, [""]).result()
    [row] = pool.status()
    assert fetch(pool.page + "/")[0] == 200
    assert json.loads(fetch(pool.page + "/api/state")[2])["teachers"][0]["replicas"][0]["id"] == row["id"]
    own = {"teacher": "net", "replica": row["id"]}
    for url in (pool.page, _replicas_own(row["id"])):
        families = {one.name: one for one in text_string_to_metric_families(fetch(url + "/metrics")[2].decode())}
        assert families["schoolhouse_requests"].samples[0].labels == own
    [lines] = pool.logs("net", row["id"], 100).values()
    began = next(line for line in map(json.loads, lines) if line["message"] == "a session began")
    assert (began["teacher"], began["replica"], began["job"]) == ("net", row["id"], "exp")


def _replicas_own(replica_id):
    """Where the replica's own metrics are: the one of the range that says so."""
    for port in range(18300, 18400):
        url = f"http://127.0.0.1:{port}"
        try:
            if replica_id in fetch(url + "/metrics")[2].decode():
                return url
        except OSError:
            continue
    raise AssertionError("no port of the range has it")


@pytest.mark.parametrize("wrong", ["log_format: xml", "http_port: 70000", "metrics_ports: x"])
def test_settings_are_checked(tmp_path, wrong):
    (tmp_path / "pool.yaml").write_text(f"{wrong}\nteachers: {{net: {{build: 'models:Net'}}}}")
    with pytest.raises(sh.errors.ConfigError, match="log_format|port"):
        load_pool(tmp_path / "pool.yaml")
