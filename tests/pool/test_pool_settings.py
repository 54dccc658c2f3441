"""The pool file's settings of where replicas run and how many, and what the command line shows of them."""

import contextlib
import socket
from types import SimpleNamespace

import grpc
import pytest
from schoolhouse.errors import ConfigError, TeacherUnavailableError
from schoolhouse_server.common.logs import RingHandler
from schoolhouse_server.pool import status_rows
from schoolhouse_server.pool.config import Bounds, TeacherSpec, load_pool
from schoolhouse_server.security.ports import listen
from schoolhouse_wire.v1 import directory_pb2


@pytest.fixture
def load(tmp_path):
    def read(teacher, pool=""):
        path = tmp_path / "pool.yaml"
        path.write_text(f"{pool}\nteachers: {{net: {{build: 'm:f', {teacher}}}}}\n")
        return load_pool(path)

    return read


def test_what_is_right(load):
    pool = load(
        "replicas: {min: 2, max: 4}, placement: STRICT_SPREAD, labels: {accelerator-type: H100}, "
        "autoscale: {target_delay_s: 0.05}",
        "ports: 7100-7199\nadvertise: {10.0.0.1: a.example.org}\nlinger_s: 60",
    )
    spec = pool.teachers["net"]
    assert spec.bounds == Bounds(min=2, max=4)
    assert spec.autoscale.target_delay_s == 0.05
    assert pool.replica_ports == range(7100, 7200)
    assert pool.advertise == {"10.0.0.1": "a.example.org"}
    assert load("threads: 1", "ports: 7100").replica_ports == range(7100, 7101)
    plain = load("replicas: 3")
    assert plain.teachers["net"].bounds == Bounds(min=3, max=3)
    assert list(plain.replica_ports) == [0]
    assert load("threads: 1", "advertise: nat.example.org").advertise == "nat.example.org"


@pytest.mark.parametrize(
    ("teacher", "pool", "says"),
    [
        ("replicas: 0", "", "greater than or equal to 1"),
        ("replicas: {min: 3, max: 2}", "", "min must not be above max"),
        ("replicas: {min: 1, most: 2}", "", "most"),
        ("placement: ANYWHERE", "", "'STRICT_SPREAD'"),
        ("autoscale: {target_delay_s: 0}", "", "target_delay_s"),
        ("labels: {ray.io/node-id: abc}", "", "is reserved for placement"),
        ("threads: 1", "ports: any", "FIRST-LAST, as in 7100-7199"),
        ("threads: 1", "ports: 7199-7100", "the smaller one first"),
        ("threads: 1", "ports: 0-99999", "from 1 to 65535"),
        ("threads: 1", "drain_timeout_s: -1", "drain_timeout_s"),
        ("max_sessions: 0", "", "max_sessions: Input should be greater than or equal to 1"),
        ("max_sessions: 70000", "", "max_sessions: Input should be less than or equal to 65536"),
    ],
)
def test_what_is_wrong(load, teacher, pool, says):
    with pytest.raises(ConfigError) as caught:
        load(teacher, pool)
    assert says in str(caught.value)


def test_replicas_as_typed_on_the_command_line():
    assert Bounds.parse("3") == Bounds(min=3, max=3)
    assert Bounds.parse("2-5") == Bounds(min=2, max=5)
    for wrong in ("", "x", "0", "5-2", "-3", "1-2-3", "2000"):
        with pytest.raises(ConfigError, match=r"or MIN-MAX, as in 2-5"):
            Bounds.parse(wrong)
    assert [Bounds(min=2, max=5).clamp(count) for count in (1, 3, 9)] == [2, 3, 5]
    assert TeacherSpec(build="m:f").bounds == Bounds(min=1, max=1)


def test_a_free_port_of_the_range_or_an_error_that_names_it():
    with contextlib.ExitStack() as stack:
        for first in range(23000, 24000, 3):  # three free ones in a row
            with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
                for port in range(first, first + 3):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
                break
        ports, taken = range(first, first + 3), []
        for _ in ports:
            server = grpc.server(None, options=[("grpc.so_reuseport", 0)])
            taken.append(listen(server, "127.0.0.1", ports))
            stack.callback(server.stop, 0)
            server.start()
        assert sorted(taken) == list(ports)
        server = grpc.server(None, options=[("grpc.so_reuseport", 0)])
        stack.callback(server.stop, 0)
        with pytest.raises(TeacherUnavailableError, match=f"{first}-{first + 2} is free on 127.0.0.1; widen"):
            listen(server, "127.0.0.1", ports)
        with pytest.raises(TeacherUnavailableError, match=f"127.0.0.1:{first}; is the port taken"):
            listen(server, "127.0.0.1", (first,))


def test_jobs_are_summed_over_the_replicas_of_a_revision():
    def member(revision, **jobs):
        told = [directory_pb2.JobLoad(job=name, weight=2.0, rows=rows, sessions=1) for name, rows in jobs.items()]
        return SimpleNamespace(load=directory_pb2.Load(jobs=told), report=SimpleNamespace(revision=revision))

    rows = status_rows.jobs(
        {"net": [member("r1", a=3, b=5), member("r1", a=4), member("r2", a=7)], "other": [member("r9")]}
    )
    found = [(row["teacher"], row["job"], row["revision"], row["rows"], row["sessions"]) for row in rows]
    assert found == [("net", "a", "r1", 7, 2), ("net", "a", "r2", 7, 1), ("net", "b", "r1", 5, 1)]
    assert {row["weight"] for row in rows} == {2.0}


def test_the_last_log_records_are_kept():
    import logging

    ring = RingHandler(3)
    logger = logging.Logger("x")
    logger.addHandler(ring)
    for i in range(5):
        logger.warning("number %d", i)
    assert [line.split(": ")[-1] for line in ring.lines(2)] == ["number 3", "number 4"]
    assert len(ring.lines(99)) == 3
    assert ring.lines(99)[0].endswith("WARNING x: number 2")
