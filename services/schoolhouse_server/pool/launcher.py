"""`python -m schoolhouse_server.pool.launcher`: starts a pool by a job of a Ray cluster, and again if it is lost.

Each state of the pool's files has one job, whose id names that state. Ray's job server remembers a job as long as the
cluster keeps its state, and can be asked without a driver. So a pool that was launched is left alone, until its files
change or the head node comes back without it.
"""

import argparse
import contextlib
import json
import logging
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TIMEOUT_S = 30.0
_MAX_BYTES = 64 << 20  # read of one answer
_MAX_WHY = 2000
_LOOK_S = 15.0
_MAX_BACKOFF_S = 300.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_log = logging.getLogger(__name__)


class JobServer:
    """Ray's job server, over its REST interface; every call raises `OSError` if the answer is missing or an error."""

    def __init__(self, address: str, token: str = "") -> None:
        self._address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def states(self, prefix: str) -> dict[str, str]:
        """The state of each job whose id begins with `prefix`."""
        found = self._ask("GET", "/api/jobs/")
        ids = {str(job.get("submission_id") or ""): str(job["status"]) for job in found}
        return {job: state for job, state in ids.items() if job.startswith(prefix)}

    def submit(self, job: str, command: Sequence[str]) -> None:
        """Run a command on the cluster's head."""
        self._ask("POST", "/api/jobs/", {"entrypoint": shlex.join(command), "submission_id": job})

    def forget(self, job: str) -> None:
        """Delete a job that has ended."""
        self._ask("DELETE", f"/api/jobs/{job}")

    def logs(self, job: str) -> str:
        """What a job has written so far."""
        return str(self._ask("GET", f"/api/jobs/{job}/logs")["logs"])

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        headers = {**self._headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                return json.loads(answer.read(_MAX_BYTES))
        except urllib.error.HTTPError as err:
            why = err.read(_MAX_WHY).decode(errors="replace").strip()
            raise OSError(f"{method} {path}: {err.code} {err.reason}: {why}") from err
        except ValueError as err:
            raise OSError(f"{method} {path}: the answer is not JSON") from err


class Launcher:
    """Gets one job done, and says whether it is; a job that fails is tried up to `attempts` times, ever more rarely."""

    def __init__(self, server: JobServer, prefix: str, job: str, command: Sequence[str], attempts: int) -> None:
        self._server, self._prefix, self._job, self._command = server, prefix, job, command
        self._left = attempts
        self._failures = 0
        self._not_before = 0.0
        self._printed = 0

    def look(self, now: float) -> bool:
        """Do what is due at `now`, on time.monotonic()'s clock; returns whether the pool is launched."""
        states = self._server.states(self._prefix)
        state = states.pop(self._job, "")
        if state:
            self._show()
        if state in ("FAILED", "STOPPED"):
            self._failed(state, now)
        elif not state and now >= self._not_before and self._left:
            self._submit(states)
        return state == "SUCCEEDED"

    def _submit(self, others: Mapping[str, str]) -> None:
        """Submit the job, once jobs of other states have ended; those are forgotten, so that going back works."""
        if any(state not in _ENDED for state in others.values()):
            return
        for other in others:
            self._server.forget(other)
        self._server.submit(self._job, self._command)
        self._left -= 1
        self._printed = 0
        _log.info("%s: submitted", self._job)

    def _failed(self, state: str, now: float) -> None:
        if not self._left:
            return
        self._failures += 1
        wait_s = min(10.0 * 2 ** (self._failures - 1), _MAX_BACKOFF_S)
        self._not_before = now + wait_s
        self._server.forget(self._job)
        _log.error("%s: %s; next try in %g s, %d tries left", self._job, state, wait_s, self._left)

    def _show(self) -> None:
        """Print what the job has written since the last look."""
        text = self._server.logs(self._job)
        sys.stdout.write(text[self._printed :])
        sys.stdout.flush()
        self._printed = len(text)


def main(arguments: list[str]) -> None:
    """Keep the pool of these arguments launched, for ever."""
    parser = argparse.ArgumentParser(
        prog="python -m schoolhouse_server.pool.launcher", description="Keep a pool launched."
    )
    parser.add_argument("--address", required=True, help="address of Ray's job server, as http://HOST:8265")
    parser.add_argument("--prefix", required=True, help="prefix of the ids of all jobs of this pool")
    parser.add_argument("--state", required=True, help="state of the pool's files, such as a digest; ends the id")
    parser.add_argument("--attempts", type=int, default=12, help="how often a job that fails is tried")
    parser.add_argument("--ready-file", type=Path, required=True, help="file that exists while the pool is launched")
    parser.add_argument("command", nargs="+", help="the command that the job runs, after --")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    server = JobServer(given.address, os.environ.get("RAY_AUTH_TOKEN", ""))
    launcher = Launcher(server, given.prefix, given.prefix + given.state, given.command, given.attempts)
    while True:
        try:
            launched = launcher.look(time.monotonic())
        except OSError as err:  # the head node is gone, or not there yet
            launched = False
            _log.warning("Ray's job server at %s: %s", given.address, err)
        if launched:
            given.ready_file.touch()
        else:
            given.ready_file.unlink(missing_ok=True)
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
