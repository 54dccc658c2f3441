"""What a keeper does when something goes wrong around it: Ray does not answer, its thread ends, there is no room."""

import contextlib
import os
import signal
import time

import keepers
import pytest
import schoolhouse as sh
import torch
from memfd import soon
from schoolhouse_server.pool.config import Bounds, PoolConfig, TeacherSpec, load_pool
from schoolhouse_server.pool.pool_state import Desired

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray

NET = "{build: 'models:Net', kwargs: {width: 32, seed: 1}, threads: 1, resources: {num_cpus: 0.3}}"
SLOW = (
    "{{build: 'slow_model:Slow', kwargs: {{forward_s: 0.05}}, threads: 1, resources: {{num_cpus: {cpus}}}, "
    "load_timeout_s: 10, replicas: {{min: 1, max: 2}}, "
    "autoscale: {{target_delay_s: 0.1, up_after_s: 1, down_after_s: 2}}}}"
)


@pytest.fixture(scope="module")
def net(cluster, tmp_path_factory):
    """A pool of one teacher, whose keeper had a bad start."""
    from schoolhouse_server.pool import driver as pool

    folder = tmp_path_factory.mktemp("pool")
    (folder / "own.py").write_text("class Odd(Exception):\n    pass\n\n\ndef raising():\n    raise Odd('only here')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "KeeperActor", keepers.Hiccup)
        found = pool.launch(pool_file(folder, net=NET))
    found.folder = folder
    yield found
    pool.clear()


def pool_file(folder, **teachers):
    given = ", ".join(f"{name}: {spec}" for name, spec in teachers.items())
    (folder / "pool.yaml").write_text(f"port: 0\ndrain_timeout_s: 4\nteachers: {{{given}}}\n")
    return load_pool(folder / "pool.yaml")


def add(pool, **teachers):
    """More teachers, in a pool that runs."""
    from schoolhouse_server.pool.actors import KEEPER, NAMESPACE

    keeper = ray.get_actor(KEEPER, namespace=NAMESPACE)
    ray.get(keeper.roll.remote(pool_file(pool.folder, **teachers), list(teachers)), timeout=60)


def eventually(check, timeout_s=100.0):
    """As `soon`, of a pool whose actors may be away."""

    def holds():
        with contextlib.suppress(ray.exceptions.RayError, sh.errors.SchoolhouseError, ValueError):
            return check()
        return False

    return soon(holds, timeout_s, collect=False)  # nor is time for the actors' imports taken away


def called(name, function):
    from schoolhouse_server.pool.actors import NAMESPACE

    return ray.get(ray.get_actor(name, namespace=NAMESPACE).__ray_call__.remote(function), timeout=60)


def replicas():
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith("teacher/")]


def test_a_keeper_to_which_ray_says_nothing_at_first_goes_on(net):
    net.wait(120)
    assert any("GCS does not answer" in line for line in net.logs()["keeper"])


def test_a_keeper_whose_thread_ends_is_started_again(net):
    net.wait(120)
    [before] = net.status()
    ended = called("keeper", keepers.end_the_thread)
    assert eventually(lambda: called("keeper", keepers.pid) != ended)
    assert eventually(lambda: [row["id"] for row in net.status()] == [before["id"]])  # taken over as it was
    os.kill(called(replicas()[0], keepers.pid), signal.SIGKILL)
    assert eventually(lambda: [row["stage"] for row in net.status() if row["id"] != before["id"]] == ["serving"])
    lost = net.teachers()["net"]["lost"]
    assert "its worker process has died" in lost  # what Ray says of it
    assert "class_name" not in lost


def test_the_directory_is_made_again_where_it_was_killed_for_good(net):
    from schoolhouse_server.pool.actors import DIRECTORY, NAMESPACE

    net.wait(120)
    ray.kill(ray.get_actor(DIRECTORY, namespace=NAMESPACE))

    def listed():
        with sh.connect(net.url("net"), timeouts=sh.Timeouts(connect_s=2)) as teacher:
            return bool(teacher.describe().revision)

    assert eventually(listed)


class Asked:
    """A teacher that is asked for more than it can do, or for nothing."""

    def __init__(self, teacher):
        self._teacher, self._asked = teacher, []

    def more(self):
        if sum(not future.done() for future in self._asked) < 20:
            begun = len(self._asked)  # equal requests would be computed once
            self._asked += [self._teacher.submit((torch.tensor([float(begun + i)]),), {}, [""]) for i in range(20)]

    def end(self):
        for future in self._asked:
            future.result(60)


@pytest.mark.timeout(300)
def test_a_replica_without_room_holds_up_no_scaling(net):
    add(net, large=SLOW.format(cpus=2.5), small=SLOW.format(cpus=0.3))  # of the four that there are
    net.wait(120)

    def rows(name):
        return [row["stage"] for row in net.status() if row["teacher"] == name]

    def grows(name, stages):
        asked.more()
        return sorted(rows(name)) == stages

    no_room = "waits for {CPU: 2.5}: no node has it free"
    with sh.connect(net.url("large")) as large, sh.connect(net.url("small")) as small:
        asked = Asked(large)
        assert eventually(lambda: grows("large", ["serving", no_room]))
        asked.end()
        net.scale("large", Bounds(min=2, max=2))  # it is wanted, whatever the load
        waiting_since, asked = time.monotonic(), Asked(small)
        assert eventually(lambda: grows("small", ["serving", "serving"]))
        asked.end()
        assert eventually(lambda: rows("small") == ["serving"])
        assert eventually(lambda: time.monotonic() > waiting_since + 11)  # longer than it may load
        assert sorted(rows("large")) == ["serving", no_room]
        assert net.teachers()["large"]["lost"] == ""
        net.scale("large", Bounds(min=1, max=2))
        assert eventually(lambda: rows("large") == ["serving"])
        assert net.teachers()["large"]["wanted"] == 1


def test_why_teachers_cannot_start(net):
    add(
        net,
        raises="{build: 'keepers:raising', kwargs: {width: 9}, resources: {num_cpus: 0.1}}",
        odd="{build: 'own:raising', resources: {num_cpus: 0.1}}",  # whose class the keeper cannot import
        late="{build: 'keepers:slow_to_load', kwargs: {seconds: 300}, load_timeout_s: 0.5, resources: {num_cpus: 0.1}}",
    )
    why = {}

    def failed():
        lost = {name: net.teachers()[name]["lost"].partition(": ")[2] for name in ("raises", "odd", "late")}
        why.update({name: one for name, one in lost.items() if one})
        return len(why) == 3

    assert eventually(failed)
    assert why["raises"] == "ValueError: a width of 9 is too much"
    assert why["odd"].endswith("Odd: only here")
    assert why["late"] == "it was not loaded within 0.5 s, its load_timeout_s"


def test_a_keeper_that_hangs_is_said_by_up_and_ended_by_down(net, monkeypatch):
    from schoolhouse_server.pool import driver as pool

    monkeypatch.setattr(pool, "_START_TIMEOUT_S", 1.0)
    monkeypatch.setattr(pool, "_CALL_TIMEOUT_S", 5.0)
    os.kill(called("keeper", keepers.pid), signal.SIGSTOP)
    with pytest.raises(sh.errors.TeacherTimeoutError, match="not answer within 1 s; .*`schoolhouse down`"):
        pool.launch(pool_file(net.folder, net=NET))
    assert pool.clear()
    assert ray.util.list_named_actors(all_namespaces=True) == []


@pytest.mark.parametrize(("labels", "stays"), [({"ray.io/node-id": "gone"}, False), ({}, True)])
def test_a_replica_that_waits_for_a_node_of_long_ago_holds_up_no_other(monkeypatch, labels, stays):
    from schoolhouse_server.pool import keeper, replica_handle

    pool = PoolConfig(teachers={"net": TeacherSpec(build="m:f", placement="STRICT_PACK", replicas=2)})
    waiting = replica_handle.Member("w", 0, object(), object(), object(), labels=labels, waits="waits for {CPU: 1}")
    teacher = keeper.Teacher([waiting])
    one = keeper.KeeperActor.__new__(keeper.KeeperActor)
    monkeypatch.setattr(replica_handle.ray, "kill", lambda actor: None)
    version = Desired.of(pool).teachers["net"].current
    one._start("net", teacher, version)
    assert teacher.members == ([waiting] if stays else [])
