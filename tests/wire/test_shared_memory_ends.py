"""Whatever way requests, sessions and processes end, no block, descriptor or mapping of shared memory is left."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import schoolhouse as sh
import torch
from forked import in_a_fork
from memfd import Sized, ask, memfds, no_collector, soon
from schoolhouse import errors
from schoolhouse_server import serve
from torch import nn

pytestmark = pytest.mark.usefixtures("no_segments")


class Gated(Sized):
    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def forward(self, count, value):
        assert self.gate.wait(30)
        return super().forward(count, value)


def test_cancelled_requests_leave_no_blocks(segments):
    module = Gated()
    with serve(module) as server, sh.connect(server.url) as teacher:
        pad = torch.zeros(100_000)
        futures = [teacher.submit((torch.tensor(100_000), pad[:1]), {}, [""]) for _ in range(20)]
        for i, future in enumerate(futures):
            if i == 10:
                module.gate.set()
            future.cancel()
        for _ in range(30):
            future = ask(teacher, 200_000, 2)
            time.sleep(0.002)
            future.cancel()
        del futures, future
        session = teacher.open_sessions()[0]

        def all_back():
            ask(teacher, 1, 1).result(20)  # tells what is done with
            return not segments[0]._blocks._taken and not session._same_host.segment._lent._taken

        assert soon(all_back)


@pytest.mark.parametrize("answered", [True, False])
def test_sessions_that_end_leave_no_memory_to_the_garbage_collector(answered):
    with serve(Sized()) as server, no_collector():
        for _ in range(5):
            with sh.connect(server.url) as teacher:
                futures = [ask(teacher, 1_000_000, i) for i in range(1 if answered else 20)]
                futures[0].result(20)
                del futures
        assert soon(lambda: memfds() == (0, 0), collect=False), memfds()


def test_a_failed_reply_frees_its_block(segments):
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = torch.zeros(10_000_000)

        def forward(self, x):
            return self.memory.fill_(x.item())

    with serve(Reusing()) as server, sh.connect(server.url) as teacher:
        futures = [teacher.submit((torch.tensor(float(i)),), {}, [""]) for i in range(6)]
        for i, future in enumerate(futures):
            error = future.exception(60)
            assert isinstance(error, errors.CorruptPayloadError) if error else future.result()[""].eq(i).all()
        del futures, future, error
        assert soon(lambda: not segments[0]._blocks._taken)


def test_features_outlive_the_teacher_and_the_replica():
    with serve(Sized()) as server:
        with sh.connect(server.url) as teacher:
            kept = ask(teacher, 100_000, 5).result(20)[""]
            large = ask(teacher, 1_000_000, 6).result(20)[""]
        del teacher
    del server
    gc.collect()
    assert kept.eq(5).all()
    del large
    assert kept.eq(5).all()
    assert kept.add_(1).eq(6).all()
    del kept
    assert soon(lambda: memfds() == (0, 0))


def test_sessions_leave_neither_descriptors_nor_mappings():
    with serve(Sized()) as server:
        for i in range(50):
            with sh.connect(server.url) as teacher:
                assert ask(teacher, 50_000, i).result(20)[""].eq(i).all()
            del teacher
            if i in (5, 49):
                assert soon(lambda: memfds() == (0, 0)), memfds()
            if i == 5:
                before = len(os.listdir("/proc/self/fd"))
        assert soon(lambda: len(os.listdir("/proc/self/fd")) <= before + 5)  # sockets are closed a little later


SERVER = """
import sys, torch
from schoolhouse_server import serve
class Sized(torch.nn.Module):
    def forward(self, count, value):
        return torch.full((int(count),), float(value))
with serve(Sized()) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def served_elsewhere():
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.stdin.close()


def segments_here():
    """The inodes of the segments that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return {int(line.split()[4]) for line in maps if "memfd:schoolhouse" in line}


def holders(inodes):
    """The processes that keep these segments: while there is one, the system keeps their memory."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if "memfd:schoolhouse" in os.readlink(fd) and fd.stat().st_ino in inodes:
                        found.add(int(pid))
            with open(f"/proc/{pid}/maps") as maps:
                if any("memfd:schoolhouse" in line and int(line.split()[4]) in inodes for line in maps):
                    found.add(int(pid))
    return found


def test_a_killed_replica_leaves_what_it_delivered_and_nothing_else():
    with served_elsewhere() as (process, url):
        teacher = sh.connect(url, timeouts=sh.Timeouts(teacher_s=0.5))
        assert teacher.describe().transport == "shared memory"
        kept = [ask(teacher, 4_000_000, i).result(20)[""] for i in range(4)]
        inodes = segments_here()
        assert holders(inodes) == {os.getpid(), process.pid}
        rest = [ask(teacher, 4_000_000, i) for i in range(8)]
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        for future in rest:
            with contextlib.suppress(errors.TeacherUnavailableError):
                future.result(30)
        assert all(feature.eq(i).all() for i, feature in enumerate(kept))
        teacher.close()
        assert all(feature.eq(i).all() for i, feature in enumerate(kept))
        assert holders(inodes) == {os.getpid()}
        assert not any("schoolhouse" in name for name in os.listdir("/dev/shm"))
        del teacher, kept, rest, future
    assert soon(lambda: memfds() == (0, 0))
    assert not holders(inodes)


def test_a_fork_gives_nothing_back():
    with served_elsewhere() as (_process, url), sh.connect(url) as teacher:
        kept = [ask(teacher, 100_000, i).result(20)[""] for i in range(4)]

        def give_back():
            status = 7 if [feature[-1].item() for feature in kept] == [0, 1, 2, 3] else 1
            kept.clear()
            gc.collect()
            teacher.close()
            return status

        assert in_a_fork(give_back) == 7
        more = [ask(teacher, 100_000, i + 10).result(20)[""] for i in range(40)]
        assert all(feature.eq(i).all() for i, feature in enumerate(kept))
        assert all(feature.eq(i + 10).all() for i, feature in enumerate(more))
        assert len(teacher.open_sessions()[0]._same_host.segment._lent._taken) == 44
