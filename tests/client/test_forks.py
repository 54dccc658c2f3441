"""Processes that are forked from one whose sessions are open, as a `DataLoader`'s workers are."""

import gc
import subprocess
import sys

import pytest
import schoolhouse as sh
import torch
from forked import in_a_fork
from schoolhouse import errors
from schoolhouse_server import serve
from torch import nn

FORKS = 100
CROWD = """
import os, sys, torch
import schoolhouse as sh
codes = []
for _ in range(int(sys.argv[2])):
    with sh.connect(sys.argv[1]) as teacher:
        teacher.submit((torch.ones(1, 2),), {}, [""]).result()
        child = os.fork()
        if child == 0:
            os._exit(7)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert codes == [7] * len(codes), codes
"""
EXITS = """
import os, sys, time, torch
import schoolhouse as sh
with sh.connect(sys.argv[1]) as teacher:
    teacher.submit((torch.ones(1, 2),), {}, [""]).result()
    for _ in range(5):
        began = time.monotonic()
        if os.fork() == 0:
            sys.exit(7)  # with all that an interpreter does at its end
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
        assert time.monotonic() - began < 4  # it waits for nothing of the parent
        assert teacher.submit((torch.ones(1, 2),), {}, [""]).result(30)[""].tolist() == [[1, 1]]
    assert len(teacher.open_sessions()) == teacher.traffic().requests - 5 == 1
"""
FIRST = """
import os, torch
import schoolhouse_server
if os.fork() == 0:
    import schoolhouse as sh
    with schoolhouse_server.serve(torch.nn.Identity()) as server, sh.connect(server.url) as teacher:
        print(teacher.submit((torch.ones(1, 2),), {}, [""]).result(30)[""].tolist(), flush=True)
    os._exit(0)
os.wait()
"""


def test_a_fork_that_does_not_ask_ends_as_it_likes():
    with serve(nn.Identity()) as server:
        subprocess.run([sys.executable, "-c", CROWD, server.url, str(FORKS)], check=True, timeout=100)


def test_a_fork_that_ends_as_interpreters_do_leaves_the_parent_alone():
    with serve(nn.Identity()) as server:
        subprocess.run([sys.executable, "-c", EXITS, server.url], check=True, timeout=100)


def test_a_fork_that_asks_is_told_what_to_do():
    x = torch.ones(1, 2)
    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()
        other = sh.RemoteTeacher(server.url)

        def ask():
            asks = [lambda: sh.connect(server.url), lambda: serve(nn.Identity()), teacher.describe, other.describe]
            for refused in [*asks, lambda: teacher.submit((x,), {}, [""])]:
                with pytest.raises(errors.UsageError, match="start it by spawn or forkserver"):
                    refused()
            return 7

        assert in_a_fork(ask) == 7
        assert in_a_fork(lambda: in_a_fork(ask)) == 7
        assert teacher.submit((x,), {}, [""]).result(30)[""].tolist() == [[1, 1]]


def test_a_fork_of_a_process_that_has_not_used_grpc_may():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=100)
    assert done.stdout == "[[1.0, 1.0]]\n", done.stderr


def test_what_was_closed_is_not_freed_in_a_fork():
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
                teacher.submit((torch.ones(1, 2),), {}, [""]).result()
        del server, teacher

        def collect():
            gc.collect()
            return 7

        assert in_a_fork(collect) == 7
        assert in_a_fork(lambda: in_a_fork(collect)) == 7
    finally:
        gc.enable()


def test_a_server_is_not_closed_by_a_fork():
    x = torch.ones(1, 2)
    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()

        def close():
            server.close()
            return 7

        assert in_a_fork(close) == 7
        assert teacher.submit((x,), {}, [""]).result(30)[""].tolist() == [[1, 1]]


class Asked(torch.utils.data.Dataset):
    """Items that a teacher makes."""

    def __init__(self, teacher):
        self.teacher = teacher

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.teacher.submit((torch.full((1, 2), float(i)),), {}, [""]).result(30)[""][0]


def test_workers_of_a_data_loader_may_ask_where_they_are_not_forks_of_this_process():
    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.describe()
        loaders = {
            how: torch.utils.data.DataLoader(Asked(teacher), batch_size=4, num_workers=1, multiprocessing_context=how)
            for how in ("forkserver", "fork")
        }
        for _ in range(2):
            assert torch.cat(list(loaders["forkserver"]))[:, 0].tolist() == list(range(8))
        with pytest.raises(errors.UsageError, match="multiprocessing_context='forkserver'"):
            list(loaders["fork"])
