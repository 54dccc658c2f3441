"""A thousand sessions of one replica: some are slow, silent or hostile, and a student trains among them."""

import contextlib
import itertools
import time

import crowd
import grpc
import psutil
import pytest
import rooms
import schoolhouse as sh
from memfd import MIB, soon
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc
from students import train

LEASE_S = 4.0
MOST_THREADS = 40
MOST_GROWTH = 160 * MIB  # 100 KiB for each session, the unsent replies, and those that gRPC has taken
SERVING = {
    "max_sessions": 1100,
    "max_in_flight": 16,
    "lease_s": LEASE_S,
    "max_job_unsent_bytes": 4 * MIB,
    "max_unsent_bytes": 16 * MIB,
}


class Replica:
    """A replica in a process of its own, and the most that it was seen to need."""

    def __init__(self):
        self.served = rooms.start(rooms.run_replica, 0, SERVING)
        self.url = f"grpc://127.0.0.1:{self.served.port}/teacher"
        self._process = psutil.Process(self.served.pid)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.served.port}")
        self._directory = directory_pb2_grpc.DirectoryServiceStub(self._channel)
        self.threads, self.rss = 0, 0

    def sessions(self):
        [found] = self._directory.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=60).teachers
        return found.replicas[0].load.sessions

    def look(self):
        self.threads = max(self.threads, self._process.num_threads())
        self.rss = max(self.rss, self._process.memory_info().rss)
        return self.rss

    def close(self):
        self._channel.close()
        self.served.kill()


@pytest.fixture
def replica():
    found = Replica()
    yield found
    found.close()


@pytest.fixture
def others(replica):
    """Starts the crowd, and ends it."""
    with contextlib.ExitStack() as stack:

        def start():
            told = rooms.start(crowd.run_crowd, replica.served.port, LEASE_S)
            stack.callback(told.kill)
            return told.commands

        start.end = stack.close
        yield start


def enough(report):
    """Whether each student was answered, and each kind of hostile ones told what it is to be told."""
    told = [report.told.get(kind.__name__, {}).get(error, 0) for kind, error in crowd.HOSTILE.items()]
    return report.wrong or (report.opened and report.least_answers and min(told) >= 1)


def test_an_honest_student_trains_on_among_a_thousand_sessions(replica, others):
    reports, live, growth, deadline = [crowd.Report()], [], [], time.monotonic() + 120

    def steps():
        """As many as it takes for the others to have done enough; the first two are before they come."""
        yield from range(2)
        alone, told = replica.look(), others()
        for step in itertools.count(2):
            yield step
            growth.append(replica.look() - alone)
            while told.poll():
                reports.append(told.recv())
                live.extend([replica.sessions()] if reports[-1].opened else [])
            if enough(reports[-1]) or time.monotonic() > deadline:
                return

    with sh.connect(replica.url, job="honest") as teacher:
        run = train(teacher, steps(), on_step=lambda _: time.sleep(0.02))  # its own work
        assert reports[-1].wrong == []
        assert enough(reports[-1]), reports[-1]
        assert {kind: [*found] for kind, found in reports[-1].told.items()} == {
            kind.__name__: [error] for kind, error in crowd.HOSTILE.items()
        }
        assert min(live) >= 1000
        assert replica.threads <= MOST_THREADS
        assert max(growth) < MOST_GROWTH
        others.end()
        assert soon(lambda: replica.sessions() == 1)
    run.assert_undisturbed(len(run.used))
