"""A launcher that is killed as it makes a pool: `up` makes it whole, `down` clears it, `status` says what is there."""

import contextlib
import multiprocessing
import os
import signal

import pytest
from killed_launcher import launch
from schoolhouse.errors import ConfigError
from schoolhouse_server.cli import main
from typer.testing import CliRunner

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
# Ray is not imported before the cluster is there: it reads its token then
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "schoolhouse", "schoolhouse_server.replica.replica"])


@pytest.fixture
def killed(cluster, tmp_path):
    """Has a launcher of a pool's file killed then, and gives the file; whatever is left is cleared."""
    from schoolhouse_server.pool import driver

    path = tmp_path / "pool.yaml"
    path.write_text(
        "port: 0\nteachers: {net: {build: 'models:Net', kwargs: {width: 32, seed: 1}, threads: 1, "
        "resources: {num_cpus: 0.3}}}\n"
    )

    def kill(when):
        process = _context.Process(target=launch, args=(dict(os.environ), cluster, path, when))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        return path

    yield kill
    driver.clear()


def names():
    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]


def test_nothing_is_left_of_one_that_ends_before_it_makes_the_keeper(killed):
    from schoolhouse_server.pool import driver

    killed("before")
    with pytest.raises(ConfigError, match="there is no pool .* start one"):
        driver.find()
    assert names() == []
    assert not driver.clear()


def test_parts_of_a_pool_are_seen_and_cleared_by_the_commands_or_by_up(killed, monkeypatch):
    from schoolhouse_server.pool import driver
    from schoolhouse_server.pool.config import load_pool

    def schoolhouse(command):
        return CliRunner().invoke(main.app, [command, "--address", "of this process"])

    killed("alone")
    with monkeypatch.context() as patched:
        patched.setattr(driver, "ray_cluster", contextlib.nullcontext)
        said = str(schoolhouse("status").exception)
        assert "parts of one whose keeper is gone: directory; `schoolhouse down`" in said
        assert "the pool is down" in schoolhouse("down").stdout
        assert names() == []
        assert "there is no pool on this Ray cluster; start one" in str(schoolhouse("down").exception)
    launched = driver.launch(load_pool(killed("alone")))
    assert launched.made
    assert driver.clear()
    assert names() == []


def test_a_pool_that_has_just_begun_is_cleared_or_taken_over(killed):
    from schoolhouse_server.pool import driver
    from schoolhouse_server.pool.config import load_pool

    killed("after")
    assert driver.clear()
    assert names() == []
    launched = driver.launch(load_pool(killed("after")))
    assert not launched.made
    assert driver.find().address == launched.address
    assert driver.clear()
    assert names() == []


def test_a_pool_that_becomes_whole_by_itself_is_taken_over(killed):
    from schoolhouse_server.pool import driver
    from schoolhouse_server.pool.config import load_pool

    launched = driver.launch(load_pool(killed("waits")))
    launched.wait(120)
    assert not launched.made
