"""A pool on a Ray cluster of two nodes, one of which goes away while a student trains; run in a process of its own.

`two_nodes.py kill TIMES` ends a raylet, and then has Ray say that a node is about to go, as a cloud's preemption notice
does. `two_nodes.py unplug TIMES NAMESPACE LINK ADDRESS OWN_ADDRESS` has the second raylet in a network namespace, and
takes its link down: nobody is told, packets just get lost. Prints "done".
The student's losses are those of a run without faults, to the last bit, and it leaks nothing.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
import rooms  # as its folder is on the path only now
import schoolhouse as sh
import students
import torch
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from schoolhouse_server.pool import nodes as nodes_of_ray
from schoolhouse_server.pool.actors import NAMESPACE
from schoolhouse_server.pool.config import load_pool
from schoolhouse_server.pool.driver import find, launch, ray_cluster

POOL = """
host: {host}
port: 0
security: {{insecure: {insecure}}}
drain_timeout_s: 2
teachers:
  net:
    build: models:Net
    kwargs: {{width: 512, seed: 1}}
    threads: 1
    replicas: 2
    placement: STRICT_SPREAD
    resources: {{num_cpus: 0.5}}
  elsewhere:
    build: models:Net
    threads: 1
    labels: {{kind: big}}
    resources: {{num_cpus: 0.5}}
"""
NO_ROOM = {
    "waits for {CPU: 0.5} with placement STRICT_SPREAD: no node has it free",
    "waits for {CPU: 0.5} on a node of {kind: big}: no node has it free",
}
GOING = {"serving", "serving, its node is about to go"}
LABELS = {"ray.io/availability-zone": "b", "kind": "big"}
HEALTH = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def until(true, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, find().status()
        time.sleep(0.2)


def follow(student, steps, ended, found):
    """Let a student go on, and keep what it says at the end."""
    while isinstance(step := student.commands.recv(), int):
        steps.append(step)
        time.sleep(0.05)  # else it takes the processor from the actors that start
        student.commands.send(not ended.is_set())
    found.append(step)


def nodes(rows):
    """Where replicas run, by TEACHER/ID."""
    from schoolhouse_server.pool.replica_handle import actors

    wheres = {name: ray.get(actor.where.remote(), timeout=20) for name, actor in actors().items()}
    return {f"{row['teacher']}/{row['id']}": wheres[f"{row['teacher']}/{row['id']}"] for row in rows}


def serving(teacher="net"):
    return [row for row in find().status() if row["teacher"] == teacher and row["stage"] == "serving"]


def losses():
    """Of each teacher, which replica was gone last, and why."""
    return [one["lost"] for one in find().teachers().values()]


@contextlib.contextmanager
def pool(host):
    """Start the pool; gives where students connect to."""
    file = Path(tempfile.mkdtemp()) / "pool.yaml"
    file.write_text(POOL.format(host=host, insecure=str(host != "127.0.0.1").lower()))
    found = launch(load_pool(file))
    found.wait(120)
    yield found.url("net")
    found.down()


@contextlib.contextmanager
def training(url):
    """A student meanwhile; gives its steps so far, and a function that waits for more of them."""
    steps, ended, found = [], threading.Event(), []
    student = rooms.start(students.run_slowly, url, {"security": sh.Security(insecure="//127." not in url)})
    following = threading.Thread(target=follow, args=(student, steps, ended, found), daemon=True)
    following.start()

    def goes_on():
        seen = len(steps)
        until(lambda: len(steps) > seen + 20)

    yield goes_on
    ended.set()
    following.join(60)
    [(run, leaked)] = found
    student.kill()
    assert run.errors == []
    run.assert_undisturbed(len(run.used))
    assert leaked == {}


def check_losing(second_node, lose):
    """What was on a node that is gone waits for another one, and the other replica serves on."""
    lose()
    until(lambda: len(serving()) == 1 and not serving("elsewhere"))
    until(lambda: {row["stage"] for row in find().status() if row["stage"] != "serving"} == NO_ROOM)
    assert all("its node has died" in lost for lost in losses()), losses()
    second_node()
    until(lambda: len(serving()) == 2 and len(serving("elsewhere")) == 1)


def leaves(seconds):
    """Ray says that the node of `elsewhere` is there for so long; gives the node, and what it is there until."""
    [node] = [where.node_id for name, where in nodes(find().status()).items() if name.startswith("elsewhere/")]
    until_s, why = time.time() + seconds, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    assert gcs.drain_node(node, why, "the cloud takes it back", int(until_s * 1000)) == (True, "")
    return node, until_s


def check_leaving(second_node):
    """A replacement serves before the node goes; and where there is no room, what is in flight is answered in time."""
    head = ray.get_runtime_context().get_node_id()
    before, lost = nodes(find().status()), losses()
    assert nodes_of_ray.leaving() == {}
    node, until_s = leaves(3600)
    assert nodes_of_ray.leaving() == {node: int(until_s * 1000) / 1000}
    until(lambda: {row["stage"] for row in find().status()} == {*GOING, *NO_ROOM})  # all serve, and are replaced
    second_node()
    least = []
    until(lambda: least.append(len(serving())) or len(serving()) == len(find().status()) - 1 == 2)
    assert min(least) >= 1  # and the one that was about to go, until another one served
    assert all(where.node_id != node for where in nodes(find().status()).values())
    assert {name for name, where in before.items() if where.node_id == head} < {*nodes(find().status())}
    until(lambda: sum(one["Alive"] for one in ray.nodes()) == 2)  # Ray ends one that has nothing to do any more
    _, until_s = leaves(20)
    until(lambda: len(find().status()) == 3 and {row["stage"] for row in find().status()} == {"serving", *NO_ROOM})
    assert time.time() < until_s
    assert losses() == lost


def check(host, second_node, lose, times, *, leaving):
    head = ray.get_runtime_context().get_node_id()
    with pool(host) as url:
        placed = nodes(find().status())
        assert {name.split("/")[0]: where.zone for name, where in placed.items() if where.node_id != head} == {
            "net": "b",
            "elsewhere": "b",
        }
        assert sorted(name.split("/")[0] for name, where in placed.items() if where.node_id == head) == ["net"]
        with training(url) as goes_on:
            goes_on()
            for _ in range(times):
                check_losing(second_node, lose)
                goes_on()
            if leaving:
                check_leaving(second_node)
                goes_on()


def main(how, times="1", namespace="", link="", address="", own=""):
    torch.set_num_threads(1)  # as the student has: its numbers are compared to the bit
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    started = []

    def start_second():
        if how != "unplug":
            started.append(cluster.add_node(num_cpus=1, labels=LABELS))
            return
        if started:
            subprocess.run(["ip", "link", "set", link, "up"], check=True)
        labels = ",".join(f"{name}={value}" for name, value in LABELS.items())
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", cluster.address, "--block"]
        command += ["--node-ip-address", address, "--num-cpus", "1", "--labels", labels]
        started.append(subprocess.Popen(["ip", "netns", "exec", namespace, *command], stdout=subprocess.DEVNULL))

    def lose():
        if how != "unplug":
            cluster.remove_node(started[-1], allow_graceful=False)
        else:
            subprocess.run(["ip", "link", "set", link, "down"], check=True)

    cluster = Cluster()
    try:
        where = {"node_ip_address": own} if own else {}
        cluster.add_node(num_cpus=1, include_dashboard=False, _system_config=HEALTH, **where)
        start_second()
        with ray_cluster(cluster.address):
            assert ray.get_runtime_context().namespace == NAMESPACE
            until_nodes(2)
            host = "0.0.0.0" if own else "127.0.0.1"
            check(host, start_second, lose, int(times), leaving=how == "kill")
    finally:
        cluster.shutdown()
        for process in started if how == "unplug" else []:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(10)
    sys.stdout.write("done\n")


def until_nodes(count):
    deadline = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
