"""A Ray cluster on this machine that outlives the command that started it.

`python -m schoolhouse_server.pool.local_cluster` starts the cluster, prints its address, and ends it on SIGTERM. A
small file says where it runs, so that `schoolhouse status` and `schoolhouse down` find it.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
from schoolhouse_wire.errors import TeacherUnavailableError

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0


def note() -> Path:
    """The file that says where this user's local cluster runs."""
    home = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state"))  # as the XDG specification says
    return home / "schoolhouse/local-cluster.json"


def running() -> str | None:
    """The address of the local cluster, or None if there is none."""
    process = _holder()
    return None if process is None else str(json.loads(note().read_text())["address"])


def start() -> str:
    """Start a local cluster in the background; returns its address."""
    note().parent.mkdir(parents=True, exist_ok=True)
    log = note().with_suffix(".log")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "schoolhouse_server.pool.local_cluster"],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], _START_TIMEOUT_S)[0]:
        process.kill()
    address = process.stdout.readline().strip()
    if not address:
        raise TeacherUnavailableError(f"a local Ray cluster could not be started; {log} says why")
    created = psutil.Process(process.pid).create_time()
    note().write_text(json.dumps({"address": address, "pid": process.pid, "created": created}))
    return address


def stop() -> bool:
    """End the local cluster and its processes; False if there was none."""
    process = _holder()
    if process is None:
        return False
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except psutil.TimeoutExpired:
        for child in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    note().unlink(missing_ok=True)
    return True


def _holder() -> psutil.Process | None:
    try:
        found = json.loads(note().read_text())
        process = psutil.Process(found["pid"])
        return process if abs(process.create_time() - found["created"]) < 1 else None  # or the id was reused
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None


def _hold() -> None:
    from schoolhouse_server.pool.driver import ray_cluster

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with ray_cluster() as address:
        sys.stdout.write(address + "\n")
        sys.stdout.flush()
        ended.wait()


if __name__ == "__main__":
    _hold()
