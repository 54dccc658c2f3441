"""Scaling and rolling a pool on a real local Ray cluster, while a student trains; the keeper may die meanwhile."""

import contextlib
import os
import re
import signal
import threading
import time

import grpc
import pytest
import schoolhouse as sh
import torch
from models import Net
from schoolhouse.errors import ConfigError, RevisionChangedError, UnknownTeacherError
from schoolhouse_server.pool.config import Bounds, load_pool
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def read(folder, seed=1, replicas="1", more="", build="models:Net"):
    path = folder / "pool.yaml"
    path.write_text(
        f"port: 0\nports: 21700-21799\nadvertise: localhost\ndrain_timeout_s: 4\n{more}\n"
        f"teachers: {{net: {{build: '{build}', "
        f"kwargs: {{width: 32, seed: {seed}}}, replicas: {replicas}, threads: 1, resources: {{num_cpus: 0.3}}}}}}\n"
    )
    return load_pool(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(scope="module")
def pool(cluster, folder):
    from schoolhouse_server.pool.driver import launch

    found = launch(read(folder))
    try:
        found.wait(120)
        yield found
    finally:
        found.down()


class Student:
    """Asks step after step, and checks each answer with the model that it began with."""

    def __init__(self, url, seed):
        self.model, self.steps, self.failed, self._end = Net(32, seed=seed), 0, [], threading.Event()
        self._teacher = sh.connect(url, job="exp-1")
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def _train(self):
        expected = self.model(X)
        while not self._end.is_set() and not self.failed:
            try:
                assert torch.equal(self._teacher.submit((X,), {}, [""]).result(60)[""], expected)
                self.steps += 1
            except Exception as err:
                self.failed.append(err)
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()
        self._teacher.close()


def eventually(true, timeout_s=100.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(ray.exceptions.RayError):
            if true():
                return True
        time.sleep(0.2)
    return False


def listed(pool):
    with grpc.insecure_channel(pool.address, options=channel.CLIENT_OPTIONS) as opened:
        stub = directory_pb2_grpc.DirectoryServiceStub(opened)
        return stub.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=10).teachers[0]


def revision(seed):
    return sh.LocalTeacher(Net(32, seed=seed)).describe().revision


def kill(name):
    from schoolhouse_server.pool.actors import NAMESPACE

    actor = ray.get_actor(name, namespace=NAMESPACE)
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


def test_addresses_are_as_the_file_says(pool):
    [replica] = listed(pool).replicas
    host, port = replica.address.split(":")
    assert host == "localhost"
    assert 21700 <= int(port) <= 21799
    assert pool.address.startswith("localhost:")
    assert replica.host == os.uname().nodename
    assert listed(pool).revision == revision(1)


def test_a_job_keeps_its_revision_and_the_next_one_gets_the_new(pool, folder):
    from schoolhouse_server.pool.actors import DIRECTORY, KEEPER

    with Student(pool.url("net"), seed=1) as student:
        assert eventually(lambda: student.steps > 0)
        pool.roll(read(folder, seed=2), ["net"], 120)
        found = listed(pool)
        assert found.revision == revision(2)
        assert {r.revision for r in found.replicas} == {revision(1), revision(2)}
        [new] = [r for r in found.replicas if r.revision == found.revision]
        with sh.connect(f"grpc://{new.address}/net") as teacher:
            assert torch.equal(teacher.submit((X,), {}, [""]).result(20)[""], Net(32, seed=2)(X))
        before = {row["id"] for row in pool.status()}
        kill(KEEPER)
        kill(DIRECTORY)
        assert eventually(lambda: {row["stage"] for row in pool.status()} == {"serving"})
        time.sleep(6)  # longer than a revision stays without a job
        assert {row["id"] for row in pool.status()} == before  # what should be is known as before
        assert pool.teachers()["net"]["revision"] == revision(2)
        assert eventually(lambda: listed(pool).revision == revision(2))
        steps = student.steps
        assert eventually(lambda: student.steps > steps + 10)
    assert student.failed == []
    assert eventually(lambda: {row["revision"] for row in pool.status()} == {revision(2)})  # its job has ended


def test_scaling_and_an_equal_revision(pool, folder):
    pool.scale("net", Bounds.parse("2"))
    pool.wait(120)
    with Student(pool.url("net"), seed=2) as student:
        assert eventually(lambda: student.steps > 0)
        before = {row["id"] for row in pool.status()}
        pool.roll(read(folder, seed=2), ["net"], 120)  # `scale` holds on, as the file says nothing new
        assert eventually(lambda: before.isdisjoint({row["id"] for row in pool.status()}))
        pool.scale("net", Bounds.parse("1"))
        assert eventually(lambda: len(pool.status()) == 1)
        steps = student.steps
        assert eventually(lambda: student.steps > steps + 10)
    assert student.failed == []
    with pytest.raises(UnknownTeacherError, match="it has: net"):
        pool.scale("nets", Bounds.parse("3"))


def test_a_roll_that_cannot_start_leaves_the_old_serving(pool, folder):
    from schoolhouse_server.pool.driver import PoolFailedError

    before = {row["id"] for row in pool.status()}
    with Student(pool.url("net"), seed=2) as student:
        with pytest.raises(PoolFailedError, match="no_such_module"):
            pool.roll(read(folder, build="no_such_module:f"), ["net"], 120)
        assert eventually(lambda: {row["id"] for row in pool.status()} == before)
        steps = student.steps
        assert eventually(lambda: student.steps > steps + 10)
    assert student.failed == []
    assert any("no_such_module" in line for line in pool.logs()["keeper"])
    [(name, lines)] = pool.logs("net").items()
    assert name == f"net/{before.pop()}"
    assert any(re.search(r"net: serving at localhost:217\d\d", line) for line in lines)
    with pytest.raises(ConfigError, match=r"no replica net/x; there are: net/"):
        pool.logs("net", "x")


def test_a_revision_whose_time_is_up_ends_in_a_typed_error(pool, folder):
    with Student(pool.url("net"), seed=2) as student:
        assert eventually(lambda: student.steps > 0)
        pool.roll(read(folder, seed=3, more="linger_s: 1"), ["net"], 120)
        assert eventually(lambda: student.failed)
    assert isinstance(student.failed[0], RevisionChangedError)


def test_replicas_follow_the_load(pool, folder):
    path = folder / "slow.yaml"
    path.write_text(
        "port: 0\ndrain_timeout_s: 4\n"
        "teachers: {slow: {build: 'slow_model:Slow', kwargs: {forward_s: 0.05}, threads: 1, "
        "resources: {num_cpus: 0.3}, replicas: {min: 1, max: 2}, "
        "autoscale: {target_delay_s: 0.1, up_after_s: 1, down_after_s: 3}}}\n"
    )
    pool.roll(load_pool(path), ["slow"], 120)  # a teacher that the pool did not have yet

    def count():
        return pool.teachers()["slow"]["wanted"]

    with sh.connect(pool.url("slow")) as teacher:
        asked, deadline = [], time.monotonic() + 60
        while count() == 1 and time.monotonic() < deadline:
            more = 10 if sum(not future.done() for future in asked) < 300 else 0
            asked += [
                teacher.submit((torch.tensor([float(i)]),), {}, [""]) for i in range(len(asked), len(asked) + more)
            ]
            time.sleep(0.2)
        assert count() == 2
        for i, future in enumerate(asked):
            assert future.result(60)[""].item() == i
        assert eventually(lambda: [r["stage"] for r in pool.status() if r["teacher"] == "slow"] == ["serving"])
        assert count() == 1
        assert teacher.submit((torch.ones(1),), {}, [""]).result(30)[""].item() == 1
    assert {"net", "slow"} == set(pool.teachers())
