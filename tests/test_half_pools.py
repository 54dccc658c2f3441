"""A launcher that is killed as it makes a pool: `up` makes it whole, `down` clears it, `status` says what is there."""

import os
import signal
import subprocess
import sys

import pytest
from schoolhouse.errors import ConfigError
from test_cli import PATHS, SCHOOLHOUSE

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

# Ends itself by `kill -9` before or after it makes the actor of a name, or as it waits for the replicas.
LAUNCHER = """
import os, signal, sys
from pathlib import Path

from ray.actor import ActorClass
from schoolhouse_server import actors, config, pool

address, file, when, name = sys.argv[1:]
made = ActorClass._remote

def make(self, *args, **options):
    if (when, name) == ("before", options.get("name")):
        os.kill(os.getpid(), signal.SIGKILL)
    found = made(self, *args, **options)
    if (when, name) == ("after", options.get("name")):
        os.kill(os.getpid(), signal.SIGKILL)
    return found

ActorClass._remote = make
with pool.ray_cluster(address):
    read = config.load_pool(Path(file))
    if when == "alone":  # as a `down` that is killed leaves it
        import ray
        options = dict(namespace=actors.NAMESPACE, lifetime="detached", max_restarts=-1, num_cpus=0)
        directory = ray.remote(actors.DirectoryActor).options(name="directory", **options).remote(read)
        ray.get(directory.address.remote())
        os.kill(os.getpid(), signal.SIGKILL)
    pool.launch(read).wait(120, lambda rows: when == "waits" and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.fixture
def file(cluster, tmp_path):
    """That of a pool; whatever the test leaves of it is cleared."""
    from schoolhouse_server import pool

    path = tmp_path / "pool.yaml"
    path.write_text(
        "port: 0\nteachers: {net: {build: 'models:Net', kwargs: {width: 32, seed: 1}, threads: 1, "
        "resources: {num_cpus: 0.3}}}\n"
    )
    yield path
    pool.clear()


def called(*command):
    environment = os.environ | {"PYTHONPATH": PATHS, "COLUMNS": "120"}
    return subprocess.run([*command], env=environment, capture_output=True, text=True, timeout=170)


def kill_a_launcher(cluster, file, when, name):
    done = called(sys.executable, "-c", LAUNCHER, cluster, str(file), when, name)
    assert done.returncode == -signal.SIGKILL, done.stderr


def names():
    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]


@pytest.mark.parametrize(
    ("when", "name", "left"),
    [
        ("before", "keeper", "nothing"),
        ("alone", "directory", "parts"),
        ("after", "keeper", "all"),
        ("waits", "", "all"),
    ],
)
def test_a_launcher_is_killed(cluster, file, when, name, left):
    from schoolhouse_server import pool
    from schoolhouse_server.config import load_pool

    kill_a_launcher(cluster, file, when, name)
    if left == "all":
        assert pool.find().address
    else:
        says = {"nothing": "there is no pool .* start one", "parts": "keeper is gone: directory; `schoolhouse down`"}
        with pytest.raises(ConfigError, match=says[left]):
            pool.find()
    launched = pool.launch(load_pool(file))
    launched.wait(120)
    assert launched.made == (left != "all")  # else it is the one that became whole by itself
    assert pool.clear()
    assert names() == []
    kill_a_launcher(cluster, file, when, name)
    assert pool.clear() == (left != "nothing")
    assert names() == []


def test_the_commands_see_what_is_there_and_clear_it(cluster, file):
    kill_a_launcher(cluster, file, "alone", "directory")
    status = called(*SCHOOLHOUSE, "status", "--address", cluster)
    assert status.returncode == 1
    assert "parts of one whose keeper is gone: directory" in status.stderr
    down = called(*SCHOOLHOUSE, "down", "--address", cluster)
    assert "the pool is down" in down.stdout
    assert names() == []
    again = called(*SCHOOLHOUSE, "down", "--address", cluster)
    assert again.returncode == 1
    assert "there is no pool on this Ray cluster; start one" in again.stderr
