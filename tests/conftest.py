"""Fixtures that tests share: one local Ray cluster a session, started when first asked for."""

import gc
import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import one_thread  # noqa: F401  # before torch
import pytest
import schoolhouse as sh
import torch
from memfd import memfds, soon
from schoolhouse_server import serve
from schoolhouse_wire.same_host import shared_memory
from xdist.scheduler import LoadScopeScheduling

HELPERS = str(Path(__file__).parent / "helpers")
ONE_WORKER = {  # whose tests share a Ray cluster, or look at what processes of the machine hold
    "test_benchmarks.py",
    "test_chaos_memory.py",
    "test_chaos_pool.py",
    "test_chaos_processes.py",
    "test_cli.py",
    "test_demo.py",
    "test_nodes.py",
    "test_pool.py",
    "test_rolling.py",
    "test_shared_memory_ends.py",
    "test_slurm.py",
    "test_watched_pool.py",
}


class FilesToWorkers(LoadScopeScheduling):
    """Each file's tests run in order in one worker; those of `ONE_WORKER` are as one file."""

    def _split_scope(self, nodeid):
        name = Path(nodeid.split("::")[0]).name
        return "" if name in ONE_WORKER else name


def pytest_xdist_make_scheduler(config, log):
    """Where the run has several workers."""
    return FilesToWorkers(config, log)


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that no worker has it left at the end."""
    items.sort(key=lambda item: item.path.name not in ONE_WORKER)


def pytest_collection_finish():
    """Let garbage collections, of which tests make many, leave out what has been imported: half a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def deaths():
    """What failed in the background, in words. It fails the test, unless that looks at it here and clears it."""
    found, log = [], logging.getLogger("schoolhouse_wire.background")
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)
    assert not found, "something failed in the background; its traceback is in the log"


@pytest.fixture(scope="session")
def cluster():
    """The address of the session's local Ray cluster; its workers can import the tests' models."""
    from schoolhouse_server.pool.driver import ray_cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")])
    with ray_cluster(num_cpus=4) as address:
        yield address


@pytest.fixture
def actors(monkeypatch):
    """The actors without Ray, which they need only to know where they are."""
    found = pytest.importorskip("schoolhouse_server.pool.actors")
    context = SimpleNamespace(get_actor_name=lambda: "teacher/net/a1")
    monkeypatch.setattr(found.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(found, "set_up", lambda *args, **about: None)
    return found


@pytest.fixture(params=["local", "remote"])
def teach(request):
    """Makes a teacher of a module, in this process or behind gRPC."""
    open_ones = []

    def make(module):
        if request.param == "local":
            return sh.LocalTeacher(module)
        server = serve(module, allow_head=True)
        open_ones.append(server)
        teacher = sh.connect(server.url)
        open_ones.insert(0, teacher)
        return teacher

    yield make
    for one in open_ones:
        one.close()


@pytest.fixture
def kept_port():
    """A port for servers that come one after another: nobody who asks for any free one is given it in between."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does, which may thus listen there
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def segments(monkeypatch):
    """The segments of shared memory that replicas of this process make."""
    made, create = [], shared_memory.create

    def remembered(*args, **kwargs):
        made.append(create(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(shared_memory, "create", remembered)
    return made


@pytest.fixture
def no_segments():
    """Waits until those of earlier tests are gone."""
    assert soon(lambda: memfds() == (0, 0)), memfds()


@pytest.fixture
def x():
    """A batch for `Net`."""
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
