"""Start, find and stop a pool on a Ray cluster, from a driver process."""

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from schoolhouse.errors import ConfigError, SchoolhouseError, TeacherTimeoutError, TeacherUnavailableError

from schoolhouse_server.actors import DIRECTORY, KEEPER, NAMESPACE, DirectoryActor, KeeperActor
from schoolhouse_server.config import PoolConfig

_CALL_TIMEOUT_S = 30.0
_STARTS = 3
_STOP_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


class PoolFailedError(SchoolhouseError):
    """A teacher of the pool could not be started; the message says why."""


class Pool:
    """A running pool, seen from a driver that is connected to its Ray cluster."""

    def __init__(self, directory: Any, keeper: Any) -> None:
        self._directory = directory
        self._keeper = keeper
        self.address: str = ray.get(directory.address.remote(), timeout=_CALL_TIMEOUT_S)

    def url(self, teacher: str) -> str:
        """What a student connects to."""
        return f"grpc://{self.address}/{teacher}"

    def status(self) -> list[dict[str, Any]]:
        """A row for each replica: teacher, wanted, id, stage, address, revision and load."""
        rows: list[dict[str, Any]] = ray.get(self._keeper.status.remote(), timeout=_CALL_TIMEOUT_S)
        return rows

    def wait(self, timeout_s: float, on_progress: Callable[[list[dict[str, Any]]], None] = lambda rows: None) -> None:
        """Return when every replica serves.

        Raises:
            PoolFailedError: a teacher could not be started.
            TeacherTimeoutError: it took longer than `timeout_s`; the message says what each replica is doing.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            rows = self.status()
            on_progress(rows)
            errors = ray.get(self._keeper.errors.remote(), timeout=_CALL_TIMEOUT_S)
            if errors:
                raise PoolFailedError("; ".join(f"teacher {name!r}: {why}" for name, why in errors.items()))
            if ray.get(self._keeper.ready.remote(), timeout=_CALL_TIMEOUT_S):
                on_progress(self.status())
                return
            if time.monotonic() > deadline:
                doing = ", ".join(f"{row['teacher']}/{row['id']}: {row['stage']}" for row in rows)
                raise TeacherTimeoutError(
                    f"the pool is not ready after {timeout_s} s ({doing}); has Ray the resources?"
                )
            time.sleep(0.2)

    def down(self) -> None:
        """Stop all replicas, the directory and the keeper."""
        try:
            ray.get(self._keeper.stop.remote(), timeout=_CALL_TIMEOUT_S)
        finally:
            ray.kill(self._keeper)
            ray.kill(self._directory)


def launch(config: PoolConfig) -> Pool:
    """Create the pool's actors on the Ray cluster that this process is connected to; `wait` for it afterwards.

    Raises:
        ConfigError: this cluster has a pool already.
        TeacherUnavailableError: the directory's port is taken.
    """
    if find(required=False) is not None:
        raise ConfigError("this Ray cluster has a pool already; stop it with `schoolhouse down`")
    if config.port == 0:
        config = replace(config, port=_free_port())  # fixed, so that a restarted directory is found again
    detached = {
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": 0,
        "get_if_exists": False,
    }
    directory = ray.remote(DirectoryActor).options(name=DIRECTORY, **detached).remote(config.host, config.port)
    try:
        ray.get(directory.address.remote(), timeout=_CALL_TIMEOUT_S)
    except RayError as err:
        ray.kill(directory)
        raise TeacherUnavailableError(
            f"the directory cannot listen on {config.host}:{config.port}; is it taken?"
        ) from err
    keeper = ray.remote(KeeperActor).options(name=KEEPER, max_concurrency=4, **detached).remote(config, directory)
    return Pool(directory, keeper)


def find(*, required: bool = True) -> Pool | None:
    """The pool of the Ray cluster that this process is connected to.

    Raises:
        ConfigError: there is none, and `required`.
    """
    try:
        return Pool(ray.get_actor(DIRECTORY, namespace=NAMESPACE), ray.get_actor(KEEPER, namespace=NAMESPACE))
    except ValueError as err:
        if required:
            raise ConfigError(
                "there is no pool on this Ray cluster; start one with `schoolhouse up pool.yaml`"
            ) from err
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def ray_cluster(address: str | None = None, num_cpus: int | None = None) -> Iterator[str]:
    """Connect this process to the Ray cluster at `address`, or to a local one that it starts; yields its address.

    A local one ends with the context. Ray gives its processes 30 s to come up, which a busy machine may need more
    than once: a local start is tried three times.

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
            )
        except Exception as err:  # Ray raises a bare Exception where its processes are late
            started = set(here.children(recursive=True)) - others
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(started, timeout=_STOP_TIMEOUT_S)
            if not left:
                raise TeacherUnavailableError(f"a local Ray cluster did not start: {err}") from err
            _log.warning("a local Ray cluster did not start, tried again: %s", err)
    raise AssertionError("unreachable")
