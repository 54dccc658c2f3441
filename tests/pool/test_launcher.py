"""The launcher of the chart: one job for each state of a pool's files, and one more where the cluster has lost it."""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from memfd import soon
from schoolhouse_server.pool import launcher

TOKEN = "token-of-the-cluster"


class Jobs(BaseHTTPRequestHandler):
    """Ray's job server as its REST interface is documented: jobs by id, which run until a test ends them."""

    def do_GET(self):
        if self.path == "/api/jobs/":
            jobs = [{"submission_id": job, "status": state} for job, state in self.server.jobs.items()]
            return self.answer([*jobs, {"submission_id": None, "status": "RUNNING"}])  # a driver of somebody's
        return self.answer({"logs": "started\n"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.jobs[body["submission_id"]] = "RUNNING"
        self.server.submitted.append((body["submission_id"], body["entrypoint"]))
        self.answer({"submission_id": body["submission_id"]})

    def do_DELETE(self):
        del self.server.jobs[self.path.rpartition("/")[2]]
        self.answer({})

    def answer(self, found):
        known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        body = json.dumps(found).encode() if known else b"Unauthorized: Missing authentication token"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Jobs)
    made.jobs, made.submitted = {}, []
    made.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def launch(server, state="aa", attempts=3):
    client = launcher.JobServer(server.url, TOKEN)
    return launcher.Launcher(client, "pool-", f"pool-{state}", ["sh", "-c", "up 'it'"], attempts)


def test_a_pool_that_was_launched_is_left_alone(server):
    found = launch(server)
    assert not found.look(0.0)
    assert server.submitted == [("pool-aa", """sh -c 'up '"'"'it'"'"''""")]
    assert not found.look(15.0)  # it runs
    server.jobs["pool-aa"] = "SUCCEEDED"
    assert all(found.look(30.0 + i) for i in range(100))
    assert launch(server).look(0.0)  # and a launcher that was moved to another machine does not roll it
    assert len(server.submitted) == 1


def test_a_head_that_lost_its_state_gets_the_pool_again(server):
    found = launch(server)
    found.look(0.0)
    server.jobs["pool-aa"] = "SUCCEEDED"
    assert found.look(15.0)
    server.jobs.clear()
    assert not found.look(30.0)
    assert server.jobs == {"pool-aa": "RUNNING"}


def test_a_change_waits_for_the_one_before_and_may_be_taken_back(server):
    launch(server, "aa").look(0.0)
    changed = launch(server, "bb")
    changed.look(15.0)
    assert server.jobs == {"pool-aa": "RUNNING"}
    server.jobs["pool-aa"] = "SUCCEEDED"
    changed.look(30.0)
    assert server.jobs == {"pool-bb": "RUNNING"}
    server.jobs["pool-bb"] = "SUCCEEDED"
    launch(server, "aa").look(45.0)  # `helm rollback`
    assert server.jobs == {"pool-aa": "RUNNING"}


def test_what_fails_is_tried_further_and_further_apart_and_then_left(server):
    found, now, tried = launch(server, attempts=3), 0.0, []
    while now < 3600:
        before = len(server.submitted)
        assert not found.look(now)
        if len(server.submitted) > before:
            tried.append(now)
            server.jobs["pool-aa"] = "FAILED"
        now += 1.0
    assert tried == [0.0, 11.0, 32.0]  # seen a second later, then 10 and 20 s
    assert server.jobs == {"pool-aa": "FAILED"}  # for `ray job logs`


def test_other_pools_and_drivers_are_not_ours(server):
    server.jobs["other-bb"] = "RUNNING"
    launch(server).look(0.0)
    assert server.jobs == {"other-bb": "RUNNING", "pool-aa": "RUNNING"}


def test_a_server_that_wants_another_token_is_an_error(server):
    with pytest.raises(OSError, match="GET /api/jobs/: 401 Unauthorized: Unauthorized: Missing authentication token"):
        launcher.JobServer(server.url, "wrong").states("")


def test_the_command_says_when_the_pool_is_launched(server, tmp_path):
    ready = tmp_path / "ready"
    arguments = f"--address {server.url} --prefix pool- --state aa --ready-file {ready} -- sh -c up".split()
    code = (
        "import sys; from schoolhouse_server.pool import launcher; launcher._LOOK_S = 0.05; launcher.main(sys.argv[1:])"
    )
    environment = os.environ | {"RAY_AUTH_TOKEN": TOKEN}
    with subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert soon(lambda: server.submitted == [("pool-aa", "sh -c up")], 90)
            assert not ready.exists()
            server.jobs["pool-aa"] = "SUCCEEDED"
            assert soon(ready.exists)
            server.jobs.clear()
            assert soon(lambda: not ready.exists())
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(server.submitted) == 2
