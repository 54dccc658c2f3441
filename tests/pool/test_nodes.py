"""A pool on a cluster whose nodes go away: a raylet that is killed, one whose link is down, one that says so before."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray

SCRIPT = str(HELPERS / "two_nodes.py")
OWN, OTHER = "10.213.77.1", "10.213.77.2"


def test_a_version_of_ray_that_does_not_say_is_logged_once(monkeypatch, caplog):
    from ray.autoscaler.v2 import sdk
    from schoolhouse_server.pool import nodes

    nodes._gcs.cache_clear()
    nodes._warn.cache_clear()
    monkeypatch.setattr(nodes.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    monkeypatch.delattr(sdk, "get_cluster_status")
    monkeypatch.delattr(ray._raylet, "GcsClient")
    for _ in range(3):
        assert nodes.leaving() == {}
        assert nodes.Demand.now({}) is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all(f"Ray {ray.__version__} does not say" in line for line in said)
    assert ["GcsClient" in said[0], "get_cluster_status" in said[1]] == [True, True]


def run(command, timeout_s):
    with contextlib.ExitStack() as stack:
        # Ray's `Cluster` notes its address there, where every `ray.init` of the machine without one would find it.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        process = stack.enter_context(
            subprocess.Popen(
                command,
                env=os.environ | {"RAY_TMPDIR": folder},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out[-2000:] + err[-4000:]
    assert out.splitlines()[-1] == "done"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("times", ["1", pytest.param("5", marks=[pytest.mark.chaos, pytest.mark.timeout(1100)])])
def test_a_node_is_killed_and_another_is_about_to_go(times):
    run([sys.executable, SCRIPT, "kill", times], 160 * int(times) + 200)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def namespaces():
    """Two network namespaces and the link between them; nothing in them can be reached from elsewhere."""
    first, second = (f"schoolhouse-{os.getpid()}-{i}" for i in (1, 2))
    links = [f"sh{os.getpid()}a", f"sh{os.getpid()}b"]
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command `ip` of iproute2")
    with contextlib.ExitStack() as stack:
        try:
            for name in (first, second):
                ip("netns", "add", name)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", links[0], "netns", first, "type", "veth", "peer", "name", links[1], "netns", second)
            for name, link, address in ((first, links[0], OWN), (second, links[1], OTHER)):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
        except subprocess.CalledProcessError as err:
            pytest.skip(f"network namespaces are not permitted here: {err.stderr.decode().strip()}")
        yield first, second, links[0]


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_a_link_goes_down(namespaces):
    first, second, link = namespaces
    run(["ip", "netns", "exec", first, sys.executable, SCRIPT, "unplug", "1", second, link, OTHER, OWN], 380)
