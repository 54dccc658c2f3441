"""Start, find and stop a pool on a Ray cluster, from a driver process."""

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from schoolhouse_wire.errors import ConfigError, SchoolhouseError, TeacherTimeoutError, TeacherUnavailableError

from schoolhouse_server.pool import replica_handle
from schoolhouse_server.pool.actors import DIRECTORY, KEEPER, NAMESPACE, on_the_head
from schoolhouse_server.pool.config import Bounds, PoolConfig
from schoolhouse_server.pool.keeper import Entrance, KeeperActor

_CALL_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 240.0  # for the keeper and the directory to start, which is little more than their imports
_LOGS_TIMEOUT_S = 5.0
_STARTS = 3
_STOP_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


class PoolFailedError(SchoolhouseError):
    """A teacher of the pool could not be started; the message says why."""


class Pool:
    """A running pool, as seen by a driver process that is connected to its Ray cluster."""

    def __init__(self, keeper: Any, timeout_s: float = _CALL_TIMEOUT_S, *, made: bool = False) -> None:
        self._keeper = keeper
        self.made = made  # whether this process made the pool, rather than found it
        entrance: Entrance = _asked(keeper, "entrance", timeout_s=timeout_s)
        self.address = entrance.address
        self.directory_url = entrance.url
        self.page = entrance.page  # empty without a page

    def url(self, teacher: str) -> str:
        """The URL that students of this teacher connect to."""
        return f"{self.directory_url}/{teacher}"

    def status(self) -> list[dict[str, Any]]:
        """One row for each replica: teacher, wanted, id, stage, address, revision, host and load."""
        rows: list[dict[str, Any]] = self._ask("status")
        return rows

    def jobs(self) -> list[dict[str, Any]]:
        """One row for each job of each teacher and revision: weight, sessions, and what it asked for."""
        rows: list[dict[str, Any]] = self._ask("jobs")
        return rows

    def teachers(self) -> dict[str, dict[str, Any]]:
        """For each teacher: min, max, wanted and serving replicas, revision, whether it is ready, and what failed."""
        found: dict[str, dict[str, Any]] = self._ask("teachers")
        return found

    def logs(self, teacher: str = "", replica: str = "", lines: int = 200) -> dict[str, list[str]]:
        """The last log records of each replica by TEACHER/ID; without a teacher also of the keeper and the directory.

        Raises:
            ConfigError: there is no such replica.
        """
        actors = replica_handle.actors(teacher, replica)
        if not teacher:
            with contextlib.suppress(ValueError):  # the directory is still being made
                actors = {DIRECTORY: ray.get_actor(DIRECTORY, namespace=NAMESPACE), **actors}
            actors = {KEEPER: self._keeper, **actors}
        if not actors:
            choices = ", ".join(sorted(replica_handle.actors())) or "none"
            raise ConfigError(f"there is no replica {f'{teacher}/{replica}'.rstrip('/')}; there are: {choices}")
        calls = {name: actor.logs.remote(lines) for name, actor in actors.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=_LOGS_TIMEOUT_S)
        return {name: _lines(call) for name, call in calls.items()}

    def scale(self, teacher: str, bounds: Bounds) -> None:
        """Change how many replicas a teacher may have; returns at once.

        Raises:
            UnknownTeacherError: there is no such teacher; the message lists those that there are.
        """
        self._ask("scale", teacher, bounds)

    def roll(
        self,
        config: PoolConfig,
        names: list[str],
        timeout_s: float,
        on_progress: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ) -> None:
        """Replace the replicas of these teachers by those of `config`, while the old ones go on serving.

        Returns when all new replicas serve. Old ones may stay longer, for the jobs that began with them.

        Raises:
            ConfigError: a change in `config` needs a new pool, or it has no such teacher.
            PoolFailedError: the new replicas cannot start; the old ones go on.
            TeacherTimeoutError: it took longer than `timeout_s`.
        """
        self._ask("roll", config, names)
        try:
            self.wait(timeout_s, on_progress, names)
        except TeacherTimeoutError as err:
            back = [name for name in names if self._ask("take_back", name, "it took too long")]
            if back:
                text = f"{err.message} The roll of {', '.join(back)} is taken back; the old revision goes on serving"
                raise TeacherTimeoutError(text) from err
            raise

    def wait(
        self,
        timeout_s: float,
        on_progress: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
        names: Collection[str] = (),
    ) -> None:
        """Return when every replica of these teachers serves; without `names`, of all teachers.

        Raises:
            PoolFailedError: a teacher could not be started, or a roll of it was taken back.
            TeacherTimeoutError: it took longer than `timeout_s`; the message says what each replica is doing.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            rows = self.status()
            on_progress(rows)
            found = {name: one for name, one in self.teachers().items() if name in names or not names}
            errors = {name: one["error"] or one["failed_roll"] for name, one in found.items()}
            if any(errors.values()):
                raise PoolFailedError("; ".join(f"teacher {name!r}: {why}" for name, why in errors.items() if why))
            if all(one["ready"] for one in found.values()):
                on_progress(self.status())
                return
            if time.monotonic() > deadline:
                doing = ", ".join(f"{row['teacher']}/{row['id']}: {row['stage']}" for row in rows)
                raise TeacherTimeoutError(
                    f"the pool is not ready after {timeout_s:g} s ({doing}); does the Ray cluster have the resources?"
                )
            time.sleep(0.2)

    def is_of(self, config: PoolConfig) -> bool:
        """Whether the pool was started from this configuration."""
        return bool(self._ask("is_of", config))

    def _ask(self, method: str, *args: Any) -> Any:
        return _asked(self._keeper, method, *args)

    def down(self) -> None:
        """Stop all replicas, the directory and the keeper."""
        clear()


def _asked(keeper: Any, method: str, *args: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
    """Call a method of the keeper and return its result.

    Raises:
        SchoolhouseError: the error of ours that the method raised.
        TeacherTimeoutError: the keeper does not answer in time.
    """
    try:
        return ray.get(getattr(keeper, method).remote(*args), timeout=timeout_s)
    except RayTaskError as err:
        if isinstance(err.cause, SchoolhouseError):
            raise err.cause from err
        raise
    except GetTimeoutError as err:
        raise TeacherTimeoutError(
            f"the pool's keeper did not answer within {timeout_s:g} s; try again, and if it still does not, clear the "
            "pool with `schoolhouse down`"
        ) from err


def launch(config: PoolConfig) -> Pool:
    """Create the pool's actors on the Ray cluster that this process is connected to; call `wait` afterwards.

    A pool with the same configuration that runs already, such as that of a launcher that was killed, is returned as it
    is. What is left of a pool whose keeper is gone is cleared first.

    Raises:
        ConfigError: this cluster already has another pool.
        TeacherUnavailableError: the directory's port is taken.
        TeacherTimeoutError: the directory does not start, or a running keeper does not answer, within 240 s.
    """
    running = _running()
    if running is not None:
        if not running.is_of(config):
            raise ConfigError("this Ray cluster has another pool already; stop it with `schoolhouse down`")
        return running
    clear()
    if config.port == 0:
        config = replace(config, port=_free_port())  # chosen now, so that a restarted directory has the same port
    if config.http_port == 0:
        config = replace(config, http_port=_free_port())
    keeper = on_the_head(KeeperActor, KEEPER, config, max_concurrency=16, get_if_exists=False)
    try:
        return Pool(keeper, _START_TIMEOUT_S, made=True)
    except BaseException:
        clear()
        raise


def _running() -> Pool | None:
    """The pool of this cluster, even if it has just begun to start; None if there is none, or it cannot start."""
    try:
        return Pool(ray.get_actor(KEEPER, namespace=NAMESPACE), _START_TIMEOUT_S)
    except ValueError:
        return None
    except (SchoolhouseError, RayError):
        if replica_handle.actors():  # with replicas it is a pool that did start
            raise
        return None


def find() -> Pool:
    """The pool of the Ray cluster that this process is connected to.

    Raises:
        ConfigError: there is no pool, or only what is left of one.
        SchoolhouseError: its keeper or directory does not come up; the message says why.
    """
    try:
        return Pool(ray.get_actor(KEEPER, namespace=NAMESPACE))
    except ValueError as err:
        left = ", ".join(_left())
        raise ConfigError(
            f"there is no pool on this Ray cluster, only parts of one whose keeper is gone: {left}; `schoolhouse down` "
            "clears them, and so does `schoolhouse up pool.yaml`"
            if left
            else "there is no pool on this Ray cluster; start one with `schoolhouse up pool.yaml`"
        ) from err


def clear() -> bool:
    """Stop all actors of a pool, whether or not it is whole; False if there were none.

    The keeper has 30 s to stop the others in order; then whatever is left is killed, for which Ray has another 30 s.

    Raises:
        TeacherTimeoutError: Ray has not ended all actors in time.
    """
    found = _left()
    if KEEPER in found:
        with contextlib.suppress(RayError, GetTimeoutError, ValueError):  # the keeper may hang, or be about to end
            keeper = ray.get_actor(KEEPER, namespace=NAMESPACE)
            ray.get(keeper.stop.remote(), timeout=_CALL_TIMEOUT_S)
    deadline = time.monotonic() + _CALL_TIMEOUT_S
    while left := _left():
        if time.monotonic() > deadline:
            raise TeacherTimeoutError(f"Ray has not ended {', '.join(left)} within {_CALL_TIMEOUT_S:g} s; try again")
        for name in left:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        time.sleep(0.1)
    return bool(found)


def _left() -> list[str]:
    """Names of the pool's actors; the keeper comes first: as long as it lives, it restarts the others."""
    names = [
        name for name in ray.util.list_named_actors() if replica_handle.is_replica(name) or name in (KEEPER, DIRECTORY)
    ]
    return sorted(names, key=lambda name: (name != KEEPER, name))


def _lines(call: Any) -> list[str]:
    try:
        found: list[str] = ray.get(call, timeout=0)
    except (RayError, GetTimeoutError) as err:
        return [f"(no answer: {type(err).__name__})"]
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def ray_cluster(address: str | None = None, num_cpus: int | None = None) -> Iterator[str]:
    """Connect this process to the Ray cluster at `address`, or to a local one that it starts; yields its address.

    A local cluster ends with the context. Its actors run at normal priority: with Ray's default, a niceness of 15,
    students on the same machine would take the teacher's CPU time. A local start is tried three times, as the 30 s that
    Ray gives its processes to come up may be too short on a busy machine.

    Raises:
        TeacherUnavailableError: no cluster answers at `address`, or a local one did not come up.
    """
    context = _connect(address) if address is not None else _start(num_cpus)
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    try:
        return ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as err:
        raise TeacherUnavailableError(f"no Ray cluster answers at {address}: {err}") from err


def _start(num_cpus: int | None) -> Any:
    here = psutil.Process()
    others = set(here.children(recursive=True))
    for left in reversed(range(_STARTS)):
        try:
            return ray.init(
                address="local",
                namespace=NAMESPACE,
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _system_config={"worker_niceness": 0},
            )
        except Exception as err:  # Ray raises a bare Exception if its processes are late
            started = set(here.children(recursive=True)) - others
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(started, timeout=_STOP_TIMEOUT_S)
            if not left:
                raise TeacherUnavailableError(f"a local Ray cluster did not start: {err}") from err
            _log.warning("a local Ray cluster did not start; trying again: %s", err)
    raise AssertionError("unreachable")
