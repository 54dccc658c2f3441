"""What the tests of faults are given: how many faults a test injects, and a room of replicas in which nothing leaks."""

import pytest
import schoolhouse as sh
import torch
from faults import Rounds, nothing_leaks
from rooms import Room
from schoolhouse_server import serve


@pytest.fixture(params=[1, pytest.param(20, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])])
def rounds(request):
    return Rounds(request.param)


@pytest.fixture(scope="session")
def used_once():
    """What is made once in a process, such as gRPC's own threads, is there."""
    with serve(torch.nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.submit((torch.ones(1),), {}, [""]).result(20)


@pytest.fixture
def room(used_once, request):
    """Two replicas; nothing leaks."""
    with Room(**getattr(request, "param", {})) as found, nothing_leaks(found):
        yield found
