"""`schoolhouse top`: what it shows, against a real server and in a real terminal."""

import contextlib
import io
import os
import pty
import select
import subprocess
import sys
import time

import programs
import pytest
import schoolhouse as sh
import torch
from directories import DirectoryServer
from loads import Running, load, sets
from models import Net
from rich.console import Console
from schoolhouse.errors import AuthenticationError
from schoolhouse_server import serve
from schoolhouse_server.observe.top import Screen, target_of, watch
from schoolhouse_server.security.tokens import digest_of, new_token
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.v1.directory_pb2 import JobLoad, Replica, ReplicaSet

TOP = [sys.executable, "-c", "from schoolhouse_server.cli.main import main; main()", "top"]


@contextlib.contextmanager
def directory(source, port=0):
    """A directory's server without Ray, whose table is what `source` gives at each call."""
    with DirectoryServer(port) as served:
        served.directory.sets = source
        yield f"127.0.0.1:{served.port}"


def text(screen, now):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(screen.render(now))
    return console.export_text()


def row(shown, *first):
    """The cells of the line that has these words first."""
    [line] = [line for line in shown.splitlines() if line.split()[: len(first)] == list(first)]
    return line.split()


@pytest.fixture
def screen():
    found, running = Screen("head:7070"), Running()
    found.heard(running(), 10.0)
    found.heard(running(), 12.0)
    return found


def test_rates_are_differences_by_the_replicas_own_clock(screen):
    shown = text(screen, 12.0)
    # one second further at each look, whatever the clock here says: 160 rows, 5 forwards, 0.75 s of them
    cells = row(shown, "resnet", "a1")
    assert cells[2:5] == ["serving", "rev-1", "10.0.0.1:7100"]
    assert cells[5:] == ["160", "75%", "20", "32", "of", "64", "2", "3", "4", "30%", "3"]
    assert row(shown, "resnet", "exp-42")[2:] == ["2", "1", "3", "120", "75%", "12.2", "k", "7", "1"]
    assert row(shown, "resnet", "sweep")[5:7] == ["40", "25%"]
    assert "none of 1 serves" in shown


def test_no_rates_from_one_report_or_over_a_new_start():
    def rows_per_s(*reports):
        screen = Screen("head:7070")
        for at, fields in enumerate(reports):
            screen.heard(sets(**fields), float(at))
        return row(text(screen, float(at)), "resnet", "a1")[5]

    before = {"uptime_s": 100.0, "rows": 1000}
    assert rows_per_s(before) == "-"
    assert rows_per_s(before, before) == "-"
    assert rows_per_s(before, {"uptime_s": 2.0, "rows": 10}) == "-"
    assert rows_per_s(before, {"uptime_s": 104.0, "rows": 1400}) == "100"
    assert rows_per_s(before, {"uptime_s": 104.0, "rows": 1400}, {"uptime_s": 106.0, "rows": 1500}) == "50"


def test_jobs_are_summed_over_replicas_and_the_last_30_s():
    def heard(screen, at, *rows):
        jobs = [[JobLoad(job="a", rows=n, sessions=1), JobLoad(job="b", rows=100)] for n in rows]
        loads = [load(uptime_s=100.0 + at, jobs=some) for some in jobs]
        replicas = [Replica(id=str(i), load=one) for i, one in enumerate(loads)]
        screen.heard([ReplicaSet(teacher="t", replicas=replicas)], at)

    screen = Screen("head:7070")
    for at, rows in enumerate(((0, 0), (90, 30), (90, 30), (90, 30), (90, 30), (150, 60))):
        heard(screen, 10.0 * at, *rows)
    # of what came in the last 30 s, 60 rows on one replica and 30 on the other
    assert row(text(screen, 50.0), "t", "a")[3:] == ["2", "0", "3", "100%", "210", "0", "0"]
    assert row(text(screen, 50.0), "t", "b")[3:7] == ["ended", "0", "0", "0%"]


def test_a_replica_that_is_silent_is_said_to_be(screen):
    assert "no news for 30 s" in text(screen, 42.0)


def test_names_cannot_steer_the_terminal():
    found = sets(jobs=[JobLoad(job="\x1b[2J\x1b]0;owned\x07" + "[red]x" + "y" * 1000, rows=1)])
    screen = Screen("head:7070")
    screen.heard(found, 0.0)
    shown = text(screen, 0.0)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[red]x" in shown
    assert shown.count("y") < 100


def test_an_address_in_any_of_its_forms():
    assert {target_of(url) for url in ("h:7070", "grpc://h:7070", "grpc://h:7070/resnet")} == {"h:7070"}
    for wrong in ("h", "h:x", ":7070", "http://h:7070", "h:70700", "h:0"):
        with pytest.raises(sh.errors.ConfigError, match="expected HOST:PORT"):
            target_of(wrong)


def test_once_against_a_real_server(x):
    with serve(Net()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()
        environment = os.environ | {"COLUMNS": "160"}
        done = programs.command("top", server.url, "--once", "--interval-s", "0.2", env=environment)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "teacher", "teacher")[2] == "serving"


def test_nobody_there_is_one_sentence():
    done = programs.command("top", "127.0.0.1:1", "--once")
    assert done.returncode == 1
    assert done.stderr.startswith("schoolhouse: ")
    assert "Traceback" not in done.stderr


def test_live_needs_a_terminal():
    with pytest.raises(sh.errors.ConfigError, match="--once"):
        watch("127.0.0.1:1", Console(file=io.StringIO()), interval_s=1.0, once=False)


def test_live_in_a_terminal_while_the_server_goes_and_comes_until_q():
    running = Running()
    terminal = _Terminal()
    try:
        with directory(running) as target:
            terminal.start([*TOP, target, "--interval-s", "0.2"])
            terminal.until("160")
        terminal.until("no answer for")
        with directory(running, int(target.split(":")[1])):
            terminal.until("serving")
            terminal.press(b"q")
            assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


class _Terminal:
    """A command in a terminal of 160 by 50."""

    def start(self, command):
        self._ours, theirs = pty.openpty()
        environment = os.environ | {"COLUMNS": "160", "LINES": "50", "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)

    def until(self, wanted, within_s=40.0):
        """Read until some text was written."""
        end, seen = time.monotonic() + within_s, ""
        while wanted not in seen:
            assert time.monotonic() < end, seen[-2000:]
            if select.select([self._ours], [], [], 0.2)[0]:
                seen += os.read(self._ours, 65536).decode(errors="replace")

    def press(self, key):
        os.write(self._ours, key)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._ours)


def test_it_shows_its_token(tmp_path):
    token, path = new_token(), tmp_path / "tokens.yaml"
    path.write_text(f'tokens:\n- {{sha256: "{digest_of(token)}", teachers: ["*"]}}\n')
    with serve(torch.nn.Linear(2, 2), tokens=path) as server:
        target, console = f"127.0.0.1:{server.port}", Console(file=io.StringIO(), width=120)
        watch(target, console, interval_s=0.1, once=True, security=ClientSecurity(token=token))
        assert "teacher" in console.file.getvalue()
        with pytest.raises(AuthenticationError):
            watch(target, console, interval_s=0.1, once=True)
