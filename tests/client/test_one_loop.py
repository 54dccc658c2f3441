"""All connections of a process live in one event loop, in one thread, over one channel to each server."""

import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import schoolhouse as sh
import torch
from directories import Scale, answer, ask, tasks
from memfd import soon
from schoolhouse import errors
from schoolhouse.remote import connections, session
from schoolhouse_server import serve
from schoolhouse_wire import framing
from torch import nn

CONNECTIONS = 128
CROWD = """
import os, sys, threading
import torch, schoolhouse as sh

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
own, count = threads(), int(sys.argv[2])
teachers = [sh.connect(sys.argv[1]) for _ in range(count)]
for _ in range(3):
    asked = [teacher.submit((torch.full((1, 2), float(i)),), {}, [""]) for i, teacher in enumerate(teachers)]
    assert [future.result(100)[""][0, 0].item() for future in asked] == [*range(count)]
loops = [thread.name for thread in threading.enumerate() if thread.name.startswith("schoolhouse")]
print(threads() - own, *loops)
"""


def test_many_connections_need_one_loop_and_few_threads():
    with serve(nn.Identity(), max_sessions=CONNECTIONS + 1) as server:
        command = [sys.executable, "-c", CROWD, server.url, str(CONNECTIONS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        assert soon(lambda: server.load("teacher").sessions == 0)  # all were closed at its exit
    count, *loops = done.stdout.split()
    assert int(count) <= 16  # gRPC's own ones included
    assert loops == ["schoolhouse-client"]


def test_connections_to_a_server_share_a_channel_which_the_last_one_closes():
    def channels():
        return list(connections.connections()._channels)

    assert soon(lambda: not channels())
    with serve(nn.Identity()) as one, serve(nn.Identity()) as other:
        teachers = [sh.connect(server.url) for server in (one, one, other, one)]
        for teacher in teachers:
            assert ask(teacher).result(20)[""][0].item() == 1
        assert sorted(address for address, _ in channels()) == sorted(
            f"127.0.0.1:{server.port}" for server in (one, other)
        )
        teachers.pop(2).close()
        assert soon(lambda: len(channels()) == 1)
        teachers.pop(0).close()
        assert [answer(teacher, 5) for teacher in teachers] == [5, 5]
        for teacher in teachers:
            teacher.close()
        assert soon(lambda: not channels() and tasks() == [])


def test_a_callback_runs_in_the_loop_and_may_ask_but_not_wait():
    found = []

    def called(_future):
        found.append(teacher.loop.runs_here)
        found.append(ask(teacher, 4))
        for wait in (teacher.describe, lambda: ask(sh.RemoteTeacher(server.url)), lambda: sh.connect(server.url)):
            with pytest.raises(errors.UsageError, match="a callback of a future cannot wait for it"):
                wait()
        found.append("ended")

    module = Scale(2)
    with serve(module) as server, sh.connect(server.url) as teacher:
        module.gate.clear()
        ask(teacher, 3).add_done_callback(called)
        module.gate.set()
        assert soon(lambda: found[2:] == ["ended"])
        assert found[0]
        assert found[1].result(20)[""][0].item() == 8


def test_many_threads_connect_one_teacher_once():
    with serve(Scale(2)) as server, sh.RemoteTeacher(server.url) as teacher, ThreadPoolExecutor(16) as pool:
        gate = threading.Barrier(16)
        found = list(pool.map(lambda i: (gate.wait(20), answer(teacher, i))[1], range(16)))
        assert found == [2 * i for i in range(16)]
        assert len(teacher.open_sessions()) == 1


def test_what_takes_long_is_done_elsewhere(monkeypatch):
    """Features of many bytes are decoded, and checked where all of them are, in another thread than the loop's."""
    made, checked, features_of, incoming = [], [], session.features_of, framing.Incoming

    def spied(found, original):
        def spy(*args):
            found.append(connections.connections().loop.runs_here)
            return original(*args)

        return spy

    monkeypatch.setattr(session, "features_of", spied(made, features_of))
    here = types.SimpleNamespace(**vars(framing) | {"Incoming": spied(checked, incoming)})  # and not in the server
    monkeypatch.setattr(session, "framing", here)
    with serve(nn.Identity()) as server, sh.connect(server.url, transport=sh.Transport(checksums=True)) as teacher:
        for size in (4, 4_000_000):
            x = torch.linspace(-1, 1, size)
            found = teacher.submit((x,), {}, [""], encodings={"": sh.encodings.bf16}).result(30)[""]
            assert torch.equal(found.to(torch.bfloat16), x.to(torch.bfloat16))
    assert (made, checked) == ([True, False], [True, False])
