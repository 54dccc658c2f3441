"""Processes that are forked from one whose sessions are open, as a `DataLoader`'s workers are."""

import gc
import os
import subprocess
import sys
import tempfile
import threading

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


def test_a_fork_that_does_not_ask_ends_as_it_likes():
    with serve(nn.Identity()) as server:
        subprocess.run([sys.executable, "-c", CROWD, server.url, str(FORKS)], check=True, timeout=100)


def test_forks_of_a_process_that_also_serves():
    x = torch.ones(1, 2)
    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()

        def ask():
            answer = teacher.submit((x + 1,), {}, [""]).result(30)[""]
            return 7 if answer.tolist() == [[2, 2]] else 1

        assert [in_a_fork(ask) for _ in range(5)] == [7] * 5
        assert ask() == 7


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


def test_a_fork_of_a_fork_and_its_errors():
    x = torch.ones(1, 2)
    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()

        def grandchild():
            threads = [threading.Thread(target=teacher.submit, args=((x,), {}, [""])) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            with pytest.raises(errors.UnknownTeacherError, match="there are: teacher"):
                sh.connect(server.url + "r").describe()
            with pytest.raises(errors.TeacherUnavailableError):
                sh.connect("grpc://127.0.0.1:1/teacher", connect_timeout_s=0.3).describe()
            return 7 if teacher.submit((x,), {}, [""]).result(30)[""].tolist() == [[1, 1]] else 1

        def child():
            teacher.submit((x,), {}, [""]).result(30)
            return in_a_fork(grandchild)

        assert in_a_fork(child) == 7


def test_a_fork_serves():
    x = torch.ones(1, 2)
    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()

        def ask():
            with serve(nn.Flatten()) as own, sh.connect(own.url) as here:
                return 7 if here.submit((x,), {}, [""]).result(30)[""].tolist() == [[1, 1]] else 1

        assert in_a_fork(ask) == 7


def test_workers_of_a_data_loader_may_ask():
    class Asked(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return teacher.submit((torch.full((1, 2), float(i)),), {}, [""]).result(30)[""][0]

    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.describe()
        loader = torch.utils.data.DataLoader(Asked(), batch_size=4, num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            assert torch.cat(list(loader))[:, 0].tolist() == list(range(8))


def test_the_path_without_memory_files(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = torch.ones(1, 2)
    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()
        assert in_a_fork(lambda: 6 + len(teacher.submit((x,), {}, [""]).result(30)[""])) == 7
        assert not list(tmp_path.iterdir())
