"""What `import schoolhouse` and the first connection do to a process; and a client on a system that is not Linux."""

import os
import subprocess
import sys

import pytest
import schoolhouse as sh
import torch
from schoolhouse import errors
from schoolhouse_server import serve
from torch import nn

WATCH = """
import atexit, ctypes, os, signal, sys, threading
import torch
calls = []
load = ctypes.CDLL.__init__
def spied(self, name, *args, **kwargs):
    calls.append(name)
    load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = spied

def state():
    signals = [signal.getsignal(number) for number in signal.valid_signals()]
    return dict(os.environ), signals, threading.active_count(), atexit._ncallbacks(), torch.get_num_threads()

before = state()
import schoolhouse as sh
assert state() == before
assert (calls, "grpc" in sys.modules) == ([], False), calls
"""
LOCAL = """
teacher, student = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
model = sh.convert(student, [("kd_loss", {"teacher_model": teacher, "criterion": sh.LogitsDistillationLoss()})])
model(torch.ones(1, 2))
model.compute_kd_loss().backward()
assert "grpc" not in sys.modules and calls == []
assert state()[0] == before[0]
"""
CONNECTED = """
tuned = []
from schoolhouse_wire import memory
memory.keep_freed_memory = lambda: tuned.append(True)
assert sh.RemoteTeacher.__name__ == "RemoteTeacher"
for transport, expected in ((sh.Transport(tune_allocator=False), []), (sh.Transport(), [True])):
    with sh.connect(sys.argv[1], transport=transport) as teacher:
        features = teacher.submit((torch.ones(1, 2),), {}, [""]).result(30)
        assert features[""].tolist() == [[1, 1]]
    assert tuned == expected, tuned
assert state()[0] == before[0]  # gRPC has read its own by now
"""
FORKS = """
from schoolhouse_wire.rpc.forks import grpc
from grpc._cython import cygrpc
print(cygrpc.is_fork_support_enabled())
"""
NOT_LINUX = """
import mmap, os, sys
import torch
for module in ("fcntl", "grpc", "schoolhouse"):
    sys.modules.pop(module, None)
sys.modules["fcntl"] = None  # raises ImportError, as where there is none
sys.platform = "darwin"
for name in ("memfd_create", "eventfd", "eventfd_write", "pipe2", "MFD_CLOEXEC", "MFD_ALLOW_SEALING"):
    delattr(os, name)
for name in ("MADV_REMOVE", "MADV_HUGEPAGE"):
    delattr(mmap, name)
stat = os.stat
def without_proc(path, *args, **kwargs):
    assert not str(path).startswith("/proc"), path
    return stat(path, *args, **kwargs)
os.stat = without_proc

import schoolhouse as sh
from schoolhouse_wire.same_host import shared_memory

with sh.connect(sys.argv[1]) as teacher:
    config = {"teacher_model": teacher, "criterion": torch.nn.MSELoss()}
    model = sh.convert(torch.nn.Linear(2, 2), [("kd_loss", config)])
    for x, in model.prefetch([(torch.ones(1, 2),), (torch.zeros(3, 2),)]):
        out = model(x)
        loss = model.compute_kd_loss()
        assert torch.equal(loss, ((out - x) ** 2).mean()), loss
    big = torch.arange(3_000_000.0).reshape(1, -1)
    assert torch.equal(teacher.submit((big,), {}, [""]).result(60)[""], big)
    print(teacher.describe().transport)
"""


def run(program, *arguments, **environment):
    environment = {**os.environ, **environment}
    for name in [name for name, value in environment.items() if value is None]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=150, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() or done.stderr


def test_an_import_changes_nothing_of_the_process():
    run(WATCH + LOCAL, GRPC_ENABLE_FORK_SUPPORT=None)


def test_the_first_connection_imports_grpc_and_tunes_the_allocator_unless_that_is_declined():
    with serve(nn.Identity()) as server:
        run(WATCH + CONNECTED, server.url, GRPC_ENABLE_FORK_SUPPORT=None)


@pytest.mark.parametrize(("own", "on"), [(None, False), ("1", True)])
def test_grpcs_support_of_forks_is_off_unless_the_environment_says_so(own, on):
    assert run(FORKS, GRPC_ENABLE_FORK_SUPPORT=own) == str(on)


def test_a_server_that_leaves_the_allocator_alone(monkeypatch):
    tuned = []
    monkeypatch.setattr("schoolhouse_wire.memory.keep_freed_memory", lambda: tuned.append(True))
    with serve(nn.Identity(), tune_allocator=False):
        assert tuned == []
    with serve(nn.Identity()):
        assert tuned == [True]
    with pytest.raises(errors.ConfigError, match="tune_allocator is 1; choices: True, False"):
        sh.connect("grpc://127.0.0.1:1/teacher", transport=sh.Transport(tune_allocator=1))


def test_a_client_on_a_system_without_shared_memory_takes_the_stream_and_says_why():
    with serve(nn.Identity()) as server:
        says = "stream: shared memory needs os.memfd_create, which this system (darwin) does not have"
        assert run(NOT_LINUX, server.url) == says
        with sh.connect(server.url) as teacher:  # while one that has it takes it
            assert teacher.describe().transport == "shared memory"
            assert torch.equal(teacher.submit((torch.ones(1, 2),), {}, [""]).result(30)[""], torch.ones(1, 2))
