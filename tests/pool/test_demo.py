"""The demo, as a newcomer runs it: to its end, and interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytest.importorskip("ray")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.timeout(300)  # a minute and a half where nothing else runs
DEMO = [sys.executable, "-c", "from schoolhouse_server.cli.main import main; main()", "demo", "--seeds", "1"]


def is_alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def alive(processes):
    return [process for process in processes if is_alive(process)]


def is_student(process):
    with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, too
        return "schoolhouse.demo.student" in process.cmdline()
    return False


def test_the_demo_ends_with_a_table_and_a_picture(tmp_path):
    done = subprocess.run(
        DEMO, cwd=tmp_path, env=os.environ | {"COLUMNS": "120"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert all(row in done.stdout for row in ("teacher", "student alone", "student, logits+features", "bytes/step"))
    assert (tmp_path / "schoolhouse-demo.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_ends_all_that_the_demo_started(tmp_path):
    process = subprocess.Popen(DEMO, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, descendants = time.monotonic() + 90, []
    while time.monotonic() < deadline and not any(map(is_student, descendants)):
        descendants = alive(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.2)
    assert len(descendants) > 2  # Ray, and a student
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 130
    gone = time.monotonic() + 20
    while alive(descendants) and time.monotonic() < gone:
        time.sleep(0.2)
    assert alive(descendants) == []
