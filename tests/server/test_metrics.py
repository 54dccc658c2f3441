"""What replicas report, as Prometheus reads it; and the HTTP server around it."""

import json
import re
import socket
import time

import pytest
import schoolhouse as sh
import torch
from loads import fetch, load, sets
from models import Net
from prometheus_client.parser import text_string_to_metric_families
from schoolhouse_server import serve
from schoolhouse_server.observe import metrics
from schoolhouse_server.observe.counters import QUEUE_DELAY_BUCKETS_S
from schoolhouse_server.observe.web import WebServer
from schoolhouse_wire.v1.directory_pb2 import JobLoad, Replica, ReplicaSet

A1 = {"teacher": "resnet", "replica": "a1"}


def scraped(source):
    """The samples of a scrape by name and labels, and the families by name."""
    families = {found.name: found for found in text_string_to_metric_families(metrics.exposition(source).decode())}
    samples = {}
    for found in families.values():
        for sample in found.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, "Prometheus refuses a scrape that names a sample twice"
            samples[key] = sample.value
    return samples, families


@pytest.fixture
def value():
    samples, _ = scraped(sets)
    return lambda name, **labels: samples[f"schoolhouse_{name}", frozenset((A1 | labels).items())]


@pytest.fixture
def server():
    with WebServer(sets) as found:
        yield found


EXPECTED = {
    "uptime_seconds": 100,
    "requests_total": 700,
    "joined_requests_total": 5,
    "rows_total": 16_000,
    "forwards_total": 500,
    "batch_limit_rows": 64,
    "cache_hits_total": 60,
    "cache_misses_total": 140,
    "cache_bytes": 1_048_576,
    "queued_requests": 3,
    "in_flight_requests": 2,
    "sessions": 4,
    "present_queue_delay_seconds": 0.02,
}
EXPECTED_OF_JOB = {
    "job_weight": 2,
    "job_sessions": 1,
    "job_queued_requests": 2,
    "job_in_flight_requests": 3,
    "job_requests_total": 400,
    "job_rows_total": 12_000,
    "job_cost_total": 12_000,
    "job_queue_seconds_total": 8,
    "job_errors_total": 1,
    "job_waits_total": 7,
    "job_received_bytes_total": 1000,
    "job_sent_bytes_total": 2000,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_number_of_a_replica(value, name):
    assert value(name) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED_OF_JOB)
def test_each_number_of_a_job(value, name):
    assert value(name, job_name="exp-42") == EXPECTED_OF_JOB[name]


def test_maps_have_a_label(value):
    assert value("stage_seconds_total", stage="forward") == 40
    assert value("feature_bytes_total", encoding="none") == 1 << 30
    assert value("errors_total", error="TeacherBusyError") == 2


def test_the_pool_itself(value):
    samples, _ = scraped(sets)
    assert samples["schoolhouse_wanted_replicas", frozenset({("teacher", "llama")})] == 1
    what = {"revision": "rev-1", "address": "10.0.0.1:7100", "host": "gpu-1", "zone": "west", "state": "serving"}
    assert value("replica_info", **what) == 1
    assert any(("state", "draining") in labels and ("replica", "b2") in labels for _, labels in samples)


def test_the_histogram_counts_each_wait_in_all_wider_buckets(value):
    below = 0
    for i, bound in enumerate(QUEUE_DELAY_BUCKETS_S):
        below += i + 1  # what loads.py says waited in this bucket
        assert value("queue_delay_seconds_bucket", le=str(bound)) == below
    assert value("queue_delay_seconds_bucket", le="+Inf") == sum(range(15)) == value("queue_delay_seconds_count")
    assert value("queue_delay_seconds_sum") == 12.5


def test_names_types_and_help_are_as_prometheus_wants():
    for name, family in scraped(sets)[1].items():
        assert re.fullmatch(r"schoolhouse_[a-z_]+", name)
        assert family.documentation.endswith(".")
        total = all(sample.name.endswith("_total") for sample in family.samples)
        assert (family.type == "counter") == total
        assert not re.search(r"_(ms|kib|mib|percent)\b", name)


def test_a_jobs_name_cannot_break_out_of_its_label_or_fill_memory():
    hostile = 'a"} 1\nschoolhouse_rows_total{teacher="x"} 9 \x1b[2J \\'
    long = "x" * 10_000
    jobs = [JobLoad(job=name, rows=1) for name in (hostile, long + "1", long + "2")]
    found = [ReplicaSet(teacher="t", replicas=[Replica(id="r", load=load(jobs=jobs))])]
    samples, _ = scraped(lambda: found)
    names = {dict(labels)["job_name"] for name, labels in samples if name == "schoolhouse_job_rows_total"}
    assert hostile.replace("\n", r"\n").replace("\x1b", r"\u001b") in names
    assert max(map(len, names)) <= 128
    assert len(names) == 2  # those that are equal when cut are one


def test_a_replica_that_reports_nothing_yet_is_shown():
    samples, _ = scraped(lambda: [ReplicaSet(teacher="t", replicas=[Replica(id="r")])])
    assert samples["schoolhouse_rows_total", frozenset({("teacher", "t"), ("replica", "r")})] == 0


def test_over_http(server):
    status, headers, body = fetch(server.url + "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert body == metrics.exposition(sets)


def test_state_is_all_of_a_load_as_numbers(server):
    status, headers, body = fetch(server.url + "/api/state")
    state = json.loads(body)
    assert (status, headers["Content-Type"], state["version"]) == (200, "application/json", 1)
    assert abs(state["time_s"] - time.time()) < 60
    assert state["queue_delay_buckets_s"] == list(QUEUE_DELAY_BUCKETS_S)
    [resnet, llama] = state["teachers"]
    assert (llama["teacher"], llama["wanted"], llama["replicas"]) == ("llama", 1, [])
    [a1, b2] = resnet["replicas"]
    assert (a1["state"], b2["state"], a1["host"], b2["host"]) == ("serving", "draining", "gpu-1", "")
    assert a1["load"]["stage_s"] == {"queue": 12.5, "forward": 40.0, "send": 3.0}
    assert a1["load"]["queue_delay_counts"] == list(range(1, 15))
    assert a1["load"]["jobs"][0]["rows"] == 12_000
    assert set(a1["load"]) == {field.name for field in load().DESCRIPTOR.fields}
    assert b2["load"]["jobs"] == []


def test_state_has_no_number_that_json_has_not():
    found = [ReplicaSet(teacher="t", replicas=[Replica(id="r", load=load(queue_delay_s=float("inf")))])]
    with WebServer(lambda: found) as server:
        state = json.loads(fetch(server.url + "/api/state")[2], parse_constant=pytest.fail)
    assert state["teachers"][0]["replicas"][0]["load"]["queue_delay_s"] is None


def test_head_has_no_body_and_others_are_refused(server):
    status, headers, body = fetch(server.url + "/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        status, headers, _ = fetch(server.url + "/metrics", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


PATHS = [
    "/../metrics.py",
    "/..%2f..%2fpyproject.toml",
    "//etc/passwd",
    "/page/index.html",
    "/page.js/../../web.py",
    "/%00",
]


@pytest.mark.parametrize("path", PATHS)
def test_only_known_paths_are_served(server, path):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:  # clients tidy such paths up
        plain.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b"".join(iter(lambda: plain.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.0 404")


def test_a_foreign_page_cannot_read_it_by_a_name_of_its_own(server):
    for host in ("evil.example", "127.0.0.1.evil.example", "127.evil.example:80", "[::2"):
        assert fetch(server.url + "/api/state", headers={"Host": host})[0] == 403
    for host in ("localhost:9", "127.0.0.1", f"127.0.0.1:{server.port}", "[::1]:80"):
        assert fetch(server.url + "/api/state", headers={"Host": host})[0] == 200
    headers = fetch(server.url + "/")[1]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_taken_port_and_what_is_none():
    with WebServer(sets) as server:
        with pytest.raises(sh.errors.TeacherUnavailableError, match="is the port taken"):
            WebServer(sets, port=server.port).start()
    for port in (-1, 65536, "http"):
        with pytest.raises(sh.errors.ConfigError, match="HTTP port"):
            WebServer(sets, port=port)


def test_a_server_shows_its_own_numbers(x):
    with serve(Net(), http_port=0) as server, sh.connect(server.url, job="exp") as teacher:
        for _ in range(3):
            teacher.submit((x,), {}, [""]).result()
        samples, _ = scraped(lambda: list(server.web._source()))
        own = frozenset({("teacher", "teacher"), ("replica", "teacher")})
        assert samples["schoolhouse_requests_total", own] == 3
        assert fetch(server.web.url + "/metrics")[0] == 200
    with pytest.raises(OSError, match="refused"):
        fetch(server.web.url + "/metrics")


def test_without_a_port_nothing_listens():
    with serve(torch.nn.Linear(2, 2)) as server:
        assert server.web is None


def test_who_does_not_know_the_replicas_says_so():
    def unknown():
        raise sh.errors.TeacherUnavailableError("the directory has just started")

    with WebServer(unknown) as server:
        for path in ("/metrics", "/api/state"):
            status, _, body = fetch(server.url + path)
            assert (status, body) == (503, b"the directory has just started\n")


def test_the_first_free_port_of_a_range():
    with WebServer(sets) as first:
        ports = range(first.port, first.port + 20)
        with WebServer(sets, port=ports) as second:
            assert second.port in ports[1:]
            assert fetch(second.url + "/metrics")[0] == 200
