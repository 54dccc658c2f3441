"""A pool on a real local Ray cluster: starts, serves, is replaced when killed, and stops."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import schoolhouse as sh
import torch
from models import Net
from schoolhouse.errors import ConfigError, TeacherUnavailableError

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.ray


def make(tmp_path, replicas=2, build="models:Net"):
    from schoolhouse_server.pool import config

    path = tmp_path / "pool.yaml"
    path.write_text(
        f"port: 0\nteachers: {{net: {{build: '{build}', kwargs: {{width: 32, seed: 1}}, replicas: {replicas}, "
        "threads: 1, resources: {num_cpus: 0.5}}}\n"
    )
    return config.load_pool(path)


@pytest.fixture(scope="module")
def shared(cluster, tmp_path_factory):
    from schoolhouse_server.pool.driver import launch

    found = launch(make(tmp_path_factory.mktemp("pool")))
    yield found
    found.down()


@pytest.fixture
def pool(shared):
    shared.wait(120)  # what an earlier test killed is there again
    return shared


def pids():
    from schoolhouse_server.pool.actors import NAMESPACE

    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith("teacher/")]
    return [ray.get(ray.get_actor(n, namespace=NAMESPACE).__ray_call__.remote(lambda self: os.getpid())) for n in names]


def test_a_teacher_that_cannot_be_built_says_why(cluster, tmp_path):
    from schoolhouse_server.pool.driver import PoolFailedError, launch

    broken = launch(make(tmp_path, replicas=1, build="no_such_module:f"))
    try:
        with pytest.raises(PoolFailedError, match="no_such_module"):
            broken.wait(120)
    finally:
        broken.down()

    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert [name for name in named if name.split("/")[0] in ("keeper", "directory", "teacher")] == []


def test_a_pool_serves_and_is_kept_at_strength(pool):
    rows = pool.status()
    assert len({row["address"] for row in rows}) == 2
    assert len({row["revision"] for row in rows}) == 1
    model, x = Net(32, seed=1).requires_grad_(False), torch.randn(4, 8)
    with sh.connect(pool.url("net")) as teacher:
        for _ in range(10):
            assert torch.equal(teacher.submit((x,), {}, [""]).result()[""], model(x))
        before = {row["id"] for row in pool.status()}
        os.kill(pids()[0], signal.SIGKILL)
        for _ in range(50):  # the other replica takes over meanwhile
            assert torch.equal(teacher.submit((x,), {}, [""]).result(60)[""], model(x))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            rows = pool.status()
            if len(rows) == 2 and all(r["stage"] == "serving" for r in rows) and {r["id"] for r in rows} != before:
                break
            time.sleep(0.2)
        assert {row["id"] for row in rows} != before
        assert [row["stage"] for row in rows] == ["serving", "serving"]
        assert torch.equal(teacher.submit((x,), {}, [""]).result()[""], model(x))


def test_keeper_and_directory_may_die(pool):
    from schoolhouse_server.pool.actors import DIRECTORY, KEEPER, NAMESPACE

    before = {row["id"] for row in pool.status()}
    with sh.connect(pool.url("net")) as teacher:
        for name in (KEEPER, DIRECTORY):
            actor = ray.get_actor(name, namespace=NAMESPACE)
            os.kill(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
            assert teacher.submit((torch.ones(1, 8),), {}, [""]).result(30)[""].shape == (1, 5)
        deadline, rows = time.monotonic() + 60, []
        while time.monotonic() < deadline and [row["stage"] for row in rows] != ["serving", "serving"]:
            with contextlib.suppress(ray.exceptions.RayError):
                rows = pool.status()
            time.sleep(0.2)
        assert {row["id"] for row in rows} == before  # adopted, not started anew
    deadline = time.monotonic() + 60
    while True:
        try:
            with sh.connect(pool.url("net")) as teacher:
                assert teacher.submit((torch.ones(1, 8),), {}, [""]).result(30)[""].shape == (1, 5)
            break
        except TeacherUnavailableError:  # until the restarted directory knows its table; never UnknownTeacherError
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_lost_replica_while_the_directory_is_away(pool):
    from schoolhouse_server.pool.actors import DIRECTORY, NAMESPACE

    model, x = Net(32, seed=1).requires_grad_(False), torch.randn(4, 8)
    with sh.connect(pool.url("net"), timeouts=sh.Timeouts(connect_s=5.0)) as teacher:
        for _ in range(20):
            teacher.submit((x,), {}, [""]).result(30)
        directory = ray.get_actor(DIRECTORY, namespace=NAMESPACE)
        stopped = ray.get(directory.__ray_call__.remote(lambda self: os.getpid()))
        os.kill(stopped, signal.SIGSTOP)
        try:
            os.kill(pids()[0], signal.SIGKILL)
            for _ in range(20):
                assert torch.equal(teacher.submit((x,), {}, [""]).result(30)[""], model(x))
        finally:
            os.kill(stopped, signal.SIGCONT)


def test_a_second_pool_is_refused(pool, tmp_path):
    from schoolhouse_server.pool.driver import launch

    with pytest.raises(ConfigError, match="already"):
        launch(make(tmp_path))


def test_a_port_that_is_taken_leaves_no_pool(pool, tmp_path):
    from schoolhouse_server.pool import driver as pools

    pool.down()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = replace(make(tmp_path), port=taken.getsockname()[1])
        with pytest.raises(TeacherUnavailableError, match=f"cannot listen on 127.0.0.1:{config.port}; is the port"):
            pools.launch(config)
    assert not pools.clear()  # nothing was left


def test_a_local_cluster_that_is_late_is_tried_again(monkeypatch):
    from schoolhouse_server.pool.driver import ray_cluster

    started = []

    def late(**_):
        started.append(subprocess.Popen(["sleep", "60"]))
        if len(started) < 3:
            raise Exception("The current node timed out during startup")
        return SimpleNamespace(address_info={"gcs_address": "127.0.0.1:1"})

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_cluster() as address:
        assert address == "127.0.0.1:1"
    assert [process.poll() is None for process in started] == [False, False, True]  # what a failed start left has ended
    started[-1].kill()
    started[-1].wait()
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(Exception("still late")))
    with pytest.raises(TeacherUnavailableError, match="did not start: still late"), ray_cluster():
        pass
