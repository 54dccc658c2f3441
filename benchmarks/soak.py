"""Steps lost, and seconds of recovery, while processes of a pool are killed and stopped, and connections fail.

Students train on a pool on a local Ray cluster, each in its own process, half of them through proxies; one fault
follows another until the time is over. A step is lost if it raised, or if its batch was not used exactly once. It is a
wrong pairing if its loss differs in any bit from that of a run with the teacher in the student's process. Recovery is
the time from the `kill -9` of a replica until as many as before serve; stalled is the longest that a student waited
meanwhile. Growth and leaks are those of the students.
`python benchmarks/soak.py --seconds 60 --json`
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import schoolhouse as sh
import torch
from ray.exceptions import RayError
from schoolhouse_server.pool.actors import DIRECTORY, KEEPER, NAMESPACE
from schoolhouse_server.pool.config import PoolConfig, Resources, TeacherSpec
from schoolhouse_server.pool.driver import Pool, launch, ray_cluster
from schoolhouse_server.pool.replica_handle import actors

HELPERS = Path(__file__).resolve().parent.parent / "tests/helpers"
sys.path.insert(0, str(HELPERS))
from directories import DirectoryServer  # noqa: E402  # helpers of the tests: a student, a proxy, leak checks
from leaks import Held, rss_mib, settled  # noqa: E402
from proxy import Proxy  # noqa: E402
from rooms import WIDTH, start  # noqa: E402
from schoolhouse_wire.v1 import directory_pb2  # noqa: E402
from students import train, undisturbed  # noqa: E402

TIMEOUT_S = 120.0
SETTLE_STEPS = 100  # steps before memory is first measured, after which what is kept for good is allocated
PAUSE_S = 0.03  # pause in each step, which bounds their number: all are repeated without faults, to compare with
OUTAGE_S = 2.0


def run_student(commands: Any, url: str, settings: dict[str, Any]) -> None:
    """Train until a command comes; then send what happened."""
    torch.set_num_threads(1)
    with sh.connect(url, **settings) as teacher:
        train(teacher, 2)
    before, times, rss = Held.now(), [], []
    commands.send((0, ""))

    def on_step(number: int) -> None:
        times.append(time.monotonic())
        if number == SETTLE_STEPS:
            rss.append(rss_mib())
        time.sleep(PAUSE_S)

    with sh.connect(url, **settings) as teacher:
        run = train(teacher, itertools.takewhile(lambda _: not commands.poll(), itertools.count()), on_step, print_it)
        requests = teacher.traffic().requests
    rss.append(rss_mib())
    leaked = settled(before)
    commands.send({
        "losses": run.losses, "drawn": run.drawn, "used": run.used, "errors": len(run.errors), "times": times,
        "requests": requests, "growth_mib": rss[-1] - rss[0], "leaked": leaked,
        "fds": max(Held.now().fds - before.fds, 0),
    })  # fmt: skip


def print_it(err: Exception) -> None:
    """Print the error of a step, which is repeated and counts as lost."""
    sys.stderr.write(f"a step failed: {type(err).__name__}: {err}\n")


class Relay(threading.Thread):
    """A second directory, which lists a proxy in front of each replica of the pool."""

    def __init__(self, status: Callable[[], list[dict[str, Any]]]) -> None:
        super().__init__(daemon=True)
        self._status = status
        self._directory = DirectoryServer()
        self._ended = threading.Event()
        self._proxies: dict[str, Proxy] = {}
        self.url = self._directory.url

    def run(self) -> None:
        """Follow the replicas of the pool."""
        while not self._ended.wait(0.1):
            with contextlib.suppress(RayError, sh.errors.SchoolhouseError):
                self._follow([row for row in self._status() if row["stage"] == "serving"])

    def _follow(self, rows: list[dict[str, Any]]) -> None:
        addresses = {row["address"] for row in rows}
        for address in addresses - self._proxies.keys():
            self._proxies[address] = Proxy(int(address.rpartition(":")[2]))
        self._directory.publish(*[
            directory_pb2.Replica(
                id=row["id"], address=f"127.0.0.1:{self._proxies[row['address']].port}", revision=row["revision"]
            )
            for row in rows
        ])  # fmt: skip
        for address in self._proxies.keys() - addresses:
            self._proxies.pop(address).close()

    @property
    def proxies(self) -> list[Proxy]:
        """The present proxies."""
        return list(self._proxies.values())

    def close(self) -> None:
        """Stop following, and close the proxies and the directory."""
        self._ended.set()
        self.join(TIMEOUT_S)
        for proxy in self.proxies:
            proxy.close()
        self._directory.close()


class Faults:
    """The faults that are injected into a pool, one after another."""

    def __init__(self, config: PoolConfig, replicas: int) -> None:
        self._config, self._replicas = config, replicas
        self.pool: Pool = launch(config)
        self.pool.wait(TIMEOUT_S)
        self.relay = Relay(lambda: self.pool.status())
        self.relay.start()
        self._until(lambda: len(self.relay.proxies) == replicas)
        self.count = 0
        self.kills: list[tuple[float, float]] = []  # when each began, and when as many as before served

    def inject(self, until: float) -> None:
        """Inject all faults in turn until that time; the last one is waited for."""
        for fault in itertools.cycle(self._round()):
            if time.monotonic() >= until:
                return
            sys.stderr.write(f"{fault.__name__.strip('_')}\n")
            self.count += 1
            fault()
            time.sleep(0.5)

    def _round(self) -> list[Callable[[], None]]:
        kill = self._kill_a_replica
        faults = [kill, self._cut, self._kill_the_directory, kill, self._stop_a_replica, self._corrupt]
        return [*faults, kill, self._kill_the_keeper, self._delay, kill, self._hold, self._restart_the_pool]

    def _kill_a_replica(self) -> None:
        name, actor = next(iter(actors("teacher").items()))
        began = time.monotonic()
        os.kill(pid_of(actor), signal.SIGKILL)
        self._until(lambda: name.split("/")[1] not in self._serving() and len(self._serving()) == self._replicas)
        self.kills.append((began, time.monotonic()))

    def _stop_a_replica(self) -> None:
        pid = pid_of(next(iter(actors("teacher").values())))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(OUTAGE_S)
        os.kill(pid, signal.SIGCONT)

    def _kill_the_directory(self) -> None:
        self._kill_actor(DIRECTORY)
        self._until(self._is_found)

    def _is_found(self) -> bool:
        with sh.connect(self.pool.url("teacher"), timeouts=sh.Timeouts(connect_s=2.0)) as teacher:
            return bool(teacher.describe().revision)

    def _kill_the_keeper(self) -> None:
        self._kill_actor(KEEPER)
        self._until(lambda: len(self._serving()) == self._replicas)

    def _kill_actor(self, name: str) -> None:
        os.kill(pid_of(ray.get_actor(name, namespace=NAMESPACE)), signal.SIGKILL)

    def _restart_the_pool(self) -> None:
        self.pool.down()
        self._until(self._gone)
        self.pool = launch(self._config)
        self.pool.wait(TIMEOUT_S)

    def _gone(self) -> bool:
        for name in (DIRECTORY, KEEPER):
            with contextlib.suppress(ValueError):
                ray.get_actor(name, namespace=NAMESPACE)
                return False
        return True

    def _cut(self) -> None:
        for proxy in self.relay.proxies:
            proxy.cut()

    def _corrupt(self) -> None:
        proxy = self.relay.proxies[0]  # only one, as a request that is corrupt at every replica fails
        for towards in ("client", "server"):
            proxy.corrupt(1, towards)

    def _delay(self) -> None:
        proxies = self.relay.proxies
        for proxy in proxies:
            proxy.delay_s = 0.05
        time.sleep(OUTAGE_S)
        for proxy in proxies:
            proxy.delay_s = 0.0

    def _hold(self) -> None:
        proxy = self.relay.proxies[0]
        proxy.hold()
        time.sleep(OUTAGE_S)
        proxy.go_on()

    def _serving(self) -> list[str]:
        return [row["id"] for row in self.pool.status() if row["stage"] == "serving"]

    def _until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(RayError, sh.errors.SchoolhouseError):
                if true():
                    return
            time.sleep(0.05)
        raise TimeoutError(f"the pool did not recover within {TIMEOUT_S} s: {self.pool.status()}")

    def close(self) -> None:
        """Stop the pool."""
        self.relay.close()
        self.pool.down()


def pid_of(actor: Any) -> int:
    """The process id of an actor."""
    pid: int = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=TIMEOUT_S)
    return pid


@contextlib.contextmanager
def training(faults: Faults, students: int) -> Iterator[list[dict[str, Any]]]:
    """Have students train meanwhile; the yielded list gets their results afterwards."""
    settings = [
        {"job": f"job-{i}"}
        | ({"transport": sh.Transport(shared_memory=False), "timeouts": sh.Timeouts(request_s=30.0)} if i % 2 else {})
        for i in range(students)
    ]
    urls = itertools.cycle([faults.pool.url("teacher"), faults.relay.url])
    started = [start(run_student, url, said) for url, said in zip(urls, settings, strict=False)]
    found: list[dict[str, Any]] = []
    try:
        yield found
        for student in started:
            student.commands.send("end")
        for student in started:
            assert student.commands.poll(TIMEOUT_S), "a student hangs"
            found.append(student.commands.recv())
    finally:
        for student in started:
            student.kill()


def figures(faults: Faults, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The results that are printed."""
    expected = undisturbed(max(len(one["used"]) for one in found)).losses
    lost = wrong = 0
    for one in found:
        lost += one["errors"] + sum(one["used"].count(number) != 1 for number in one["drawn"])
        wrong += sum(a != b for a, b in zip(one["losses"], expected, strict=False))
    recovered = [end - begin for begin, end in faults.kills]
    stalled = [max(_waits(one["times"], begin, end)) for one in found for begin, end in faults.kills]
    return {
        "requests": sum(one["requests"] for one in found),
        "faults": faults.count,
        "kills": len(faults.kills),
        "steps": sum(len(one["used"]) for one in found),
        "steps_lost": lost,
        "wrong_pairings": wrong,
        "recovery_p50_s": percentile(recovered, 50),
        "recovery_p99_s": percentile(recovered, 99),
        "stalled_p50_s": percentile(stalled, 50),
        "stalled_p99_s": percentile(stalled, 99),
        "rss_growth_mb": round(max(one["growth_mib"] for one in found), 1),
        "leaked_fds": sum(one["fds"] for one in found),
        "leaked": [one["leaked"] for one in found if one["leaked"]],
    }


def _waits(times: list[float], begin: float, end: float) -> list[float]:
    """The times between steps that overlap with the time from `begin` to `end`."""
    return [b - a for a, b in itertools.pairwise(times) if b >= begin and a <= end] or [0.0]


def percentile(values: list[float], percent: int) -> float | None:
    """The percentile of the values; None if there are none."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 3) if ordered else None


def pool_of(replicas: int) -> PoolConfig:
    """A pool with the same teacher as `undisturbed`."""
    kwargs = {"width": WIDTH, "seed": 1}
    spec = TeacherSpec(
        build="models:Net", kwargs=kwargs, replicas=replicas, threads=1, resources=Resources(num_cpus=0.1)
    )
    with socket.socket() as probe:  # a fixed port, so that a restarted pool has the same one
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return PoolConfig(teachers={"teacher": spec}, port=port, drain_timeout_s=2.0, folder=HELPERS)


def main() -> None:
    """Run, and print a line, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the run; its last fault is waited for")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--students", type=int, default=2)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr), ray_cluster(num_cpus=2):  # Ray's own messages go elsewhere
        faults = Faults(pool_of(options.replicas), options.replicas)
        try:
            with training(faults, options.students) as found:
                faults.inject(time.monotonic() + options.seconds)
            printed = figures(faults, found)
        finally:
            faults.close()
    line = ", ".join(f"{name}: {value}" for name, value in printed.items())
    sys.stdout.write((json.dumps(printed) if options.json else line) + "\n")


if __name__ == "__main__":
    main()
