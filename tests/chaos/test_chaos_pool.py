"""A pool on Ray, of which parts and all are killed while a student trains: its losses are those of a run without."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest
import schoolhouse as sh
from faults import EVERY
from memfd import memfds, soon
from rooms import WIDTH, start
from schoolhouse import errors
from students import run_slowly

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:kd_loss_weight sums to less than 1")]
TIMEOUT_S = 120.0
REPLICA, ALL = "teacher/", ()
SHORT = [("keeper", "directory", REPLICA), ALL]
LONG = [(REPLICA,), ("directory", REPLICA), ("keeper", REPLICA), *SHORT] * 4


def received(student):
    assert student.commands.poll(TIMEOUT_S), "the student hangs"
    return student.commands.recv()


def names():
    """Of all actors that have not ended."""
    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]


class KilledPool:
    """A pool, and what is done to it."""

    def __init__(self, path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]  # of the directory, which a pool that is started anew has again
        path.write_text(
            f"port: {port}\nteachers: {{teacher: {{build: 'models:Net', kwargs: {{width: {WIDTH}, seed: 1}}, "
            "replicas: 2, threads: 1, resources: {num_cpus: 0.5}}}\n"
        )
        self.path, self.restarting, self.gone = path, None, set()
        self.launch()

    def launch(self):
        from schoolhouse_server.pool import config, driver

        self.pool = driver.launch(config.load_pool(self.path))
        self.pool.wait(TIMEOUT_S)

    def pids(self, prefix):
        """Those of the actors whose names begin so; raises `RayError` or `ValueError` where one has just died."""
        from schoolhouse_server.pool.actors import NAMESPACE

        found = [ray.get_actor(name, namespace=NAMESPACE) for name in names() if name.startswith(prefix)]
        return ray.get([one.__ray_call__.remote(lambda self: os.getpid()) for one in found], timeout=TIMEOUT_S)

    def kill_one_of_each(self, prefixes):
        """Of the actors whose names begin so."""
        pids = [self.pids(prefix)[0] for prefix in prefixes]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.gone |= {*pids}

    def restart(self):
        """All of it, while the student goes on as far as it can."""
        self.restarting = threading.Thread(target=self._restart)
        self.restarting.start()

    def _restart(self):
        self.pool.down()
        while names():
            time.sleep(0.05)
        self.launch()

    def recover(self):
        """Wait for as many replicas as before, and that new clients find them."""
        if self.restarting is not None:
            self.restarting.join(TIMEOUT_S)
        assert soon(self._is_whole, TIMEOUT_S)

    def _is_whole(self):
        with contextlib.suppress(ray.exceptions.RayError, errors.SchoolhouseError, ValueError):
            there = {*self.pids(REPLICA)}  # the keeper may not have seen yet who is gone
            stages = [row["stage"] for row in self.pool.status()]
            if len(there - self.gone) == 2 and stages == ["serving", "serving"]:
                with sh.connect(self.pool.url("teacher"), timeouts=sh.Timeouts(connect_s=2)) as teacher:
                    return bool(teacher.describe().revision)
        return False


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "faults",
    [SHORT, pytest.param(LONG, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])],
    ids=["short", "long"],
)
def test_parts_of_a_pool_are_killed_and_all_of_it(cluster, tmp_path, faults):
    killed = KilledPool(tmp_path / "pool.yaml")
    steps = EVERY * (len(faults) + 1)
    try:
        student = start(run_slowly, killed.pool.url("teacher"), {"timeouts": sh.Timeouts(teacher_s=200.0)})
        try:
            while isinstance(step := received(student), int):
                if 0 < step < steps and step % EVERY == 0:
                    fault = faults[step // EVERY - 1]
                    killed.restart() if fault == ALL else killed.kill_one_of_each(fault)
                elif step > EVERY and step % EVERY == EVERY - 5:
                    killed.recover()
                student.commands.send(step < steps)
            run, leaked = step
        finally:
            student.kill()
        assert run.errors == []
        assert len(run.used) > steps
        run.assert_undisturbed(len(run.used))
        assert leaked == {}
        assert soon(lambda: all(memfds(pid) == (0, 0) for pid in killed.pids(REPLICA)))
    finally:
        killed.pool.down()
