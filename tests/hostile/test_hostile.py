"""Eight tokens that mean harm, at once, and an honest student among them: what it learns is what it learns alone."""

import itertools
import json
import statistics
import sys
import time
from concurrent.futures import FIRST_COMPLETED, wait

import grpc
import psutil
import pytest
import rooms
import schoolhouse as sh
import torch
from memfd import MIB, soon
from models import Net
from raw_clients import ATTACKS, run_hostile
from rooms import WIDTH
from schoolhouse_server import serve
from schoolhouse_server.cli import probe
from schoolhouse_server.security.tokens import digest_of, new_token
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc
from students import batch, train, undisturbed

BUDGET = {"max_job_unsent_bytes": 8 * MIB, "max_unsent_bytes": 24 * MIB, "shared_memory_bytes": 4 * MIB}
SERVING = {**BUDGET, "max_sessions": 16, "max_in_flight": 16, "max_job_bytes": 4 * MIB, "max_request_tokens": 1024}
GRPC = 160 * MIB  # what gRPC keeps for streams that nobody reads, and what each session and its code take
NUMBER_S = 1e-6  # of the device, for each number of the inputs
TYPED = {"PermissionDeniedError", "MessageTooLargeError", "TeacherBusyError", "TeacherUnavailableError"}
TYPED |= {"TeacherTimeoutError", "ProtocolError", "LeaseExpiredError", "CorruptPayloadError"}
STATUS = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED"}
pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums to less than 1")


class Paced(Net):
    """The teacher of all these tests, on a device that takes its time for each number, and waits meanwhile."""

    def forward(self, x):
        time.sleep(x.numel() * NUMBER_S)
        return super().forward(x)


def run_server(commands, tokens):
    torch.set_num_threads(1)
    teacher = Paced(WIDTH, seed=1).eval().requires_grad_(False)
    with serve(teacher, tokens=tokens, **SERVING) as server:
        commands.send((server.port, ""))
        while True:
            commands.recv()


class Server:
    """A server in a process of its own, with a token for each of `jobs`; `admin` sees them all."""

    def __init__(self, folder, jobs):
        self.tokens = {job: new_token() for job in (*jobs, "admin")}
        entry = '- {{sha256: "{}", job: {}, teachers: ["*"], admin: {}}}'
        lines = [entry.format(digest_of(token), job, job == "admin") for job, token in self.tokens.items()]
        path = folder / "tokens.yaml"
        path.write_text("\n".join(["tokens:", *lines]))
        self.served = rooms.start(run_server, path)
        self.url = f"grpc://127.0.0.1:{self.served.port}/teacher"
        self._process = psutil.Process(self.served.pid)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.served.port}")
        self._directory = directory_pb2_grpc.DirectoryServiceStub(self._channel)

    def connect(self, job, **settings):
        return sh.connect(self.url, security=sh.Security(token=self.tokens[job]), **settings)

    def device_s(self):
        """What each job was charged so far."""
        metadata = [("authorization", f"Bearer {self.tokens['admin']}")]
        found = self._directory.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=60, metadata=metadata)
        return {job.job: job.device_s for job in found.teachers[0].replicas[0].load.jobs}

    @property
    def rss(self):
        return self._process.memory_info().rss

    def close(self):
        self._channel.close()
        self.served.kill()


class Hostiles:
    """The clients that mean harm, in one process; `told` is what each was told so far."""

    def __init__(self, server, jobs):
        self._process = rooms.start(run_hostile, server.served.port, {job: server.tokens[job] for job in jobs})
        self.told = {}

    def look(self):
        while self._process.commands.poll():
            self.told = self._process.commands.recv()
        return self.told

    def close(self):
        self._process.kill()


@pytest.fixture
def among(tmp_path):
    """Begins a server and hostile clients."""
    open_ones = []

    def begin(*jobs, honest=("student",)):
        server = Server(tmp_path, (*jobs, *honest))
        open_ones.append(server)
        return server

    def attack(server, *jobs):
        hostiles = Hostiles(server, jobs)
        open_ones.append(hostiles)
        return hostiles

    yield begin, attack
    for one in reversed(open_ones):
        one.close()


def told(**figures):
    """Print what was measured, for the docs."""
    sys.stdout.write(json.dumps(figures) + "\n")


class Steps:
    """Numbers of steps for `seconds`, but at least `least`; when each began."""

    def __init__(self, seconds, least):
        self._seconds, self._least, self.began = seconds, least, []

    def __iter__(self):
        end = time.monotonic() + self._seconds
        yield from itertools.takewhile(lambda n: n < self._least or time.monotonic() < end, itertools.count())

    def on_step(self, _step):
        self.began.append(time.perf_counter())

    def times(self):
        return [after - before for before, after in itertools.pairwise(self.began)][8:]


@pytest.mark.parametrize("seconds", [0, pytest.param(600, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])])
def test_a_student_learns_among_them_what_it_learns_alone(among, seconds):
    begin, attack = among
    server = begin(*ATTACKS)
    alone = Steps(seconds / 20, 60)
    with server.connect("student") as teacher:
        train(teacher, alone, alone.on_step)
    before, most = server.rss, 0
    hostiles = attack(server, *ATTACKS)
    assert soon(lambda: hostiles.look().keys() == ATTACKS.keys() and all(hostiles.told.values()), timeout_s=60)
    steps = Steps(seconds, 60)

    def on_step(step):
        nonlocal most
        steps.on_step(step)
        if step % 20 == 0:
            most = max(most, server.rss)
            assert probe.serves(f"127.0.0.1:{server.served.port}", timeout_s=20)

    with server.connect("student", timeouts=sh.Timeouts(request_s=120)) as teacher:
        run = train(teacher, steps, on_step)
    assert run.errors == []
    run.assert_undisturbed(len(run.used))
    undisturbed.cache_clear()
    found = hostiles.look()
    names = {name for told_one in found.values() for name in told_one if name[0].isupper()}
    assert names - TYPED - STATUS == set(), found
    assert most - before < 1.1 * sum(BUDGET.values()) + GRPC
    by_p99 = [statistics.quantiles(one.times(), n=100)[98] for one in (alone, steps)]
    told(p99_alone_s=by_p99[0], p99_among_s=by_p99[1], growth_mib=(most - before) // MIB, steps=len(run.used))
    if seconds:
        assert by_p99[1] <= 3 * by_p99[0]


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=[pytest.mark.chaos, pytest.mark.timeout(300)])])
def test_who_asks_as_much_as_they_gets_its_share(among, seconds):
    """Eight tokens that ask for long rows, for little, and for what it asks for itself, and one that only asks."""
    begin, attack = among
    jobs = [f"{kind}-{number}" for number in range(3) for kind in ("long", "flooding", "guessing")][:8]
    server = begin(*jobs)
    hostiles = attack(server, *jobs)
    assert soon(lambda: hostiles.look().keys() == {*jobs} and all(hostiles.told.values()), timeout_s=60)
    numbers, asked = itertools.count(), set()
    with server.connect("student", timeouts=sh.Timeouts(request_s=120)) as teacher:
        local = Net(WIDTH, seed=1).eval()

        def ask():
            x = batch(next(numbers))[1]
            future = teacher.submit((x,), {}, ["fc"])
            asked.add(future)
            future.x = x

        for _ in range(12):
            ask()
        charged, end, answered = server.device_s(), time.monotonic() + seconds, 0
        while time.monotonic() < end or answered < 50:
            done, _ = wait(asked, 60, FIRST_COMPLETED)
            assert done
            for future in done:
                asked.discard(future)
                with torch.no_grad():
                    assert torch.equal(future.result()["fc"], local(future.x))
                answered += 1
                ask()
        gained = {job: spent - charged.get(job, 0.0) for job, spent in server.device_s().items()}
    share = gained["student"] / sum(gained.values())
    told(share=share, fair=1 / 9, of={job: round(spent, 3) for job, spent in gained.items()})
    if seconds > 2:
        assert share >= 0.8 / 9
