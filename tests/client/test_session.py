"""What a session promises: cancelled work is dropped, lying replies are refused, other processes connect anew."""

import multiprocessing
import pickle
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import schoolhouse as sh
import torch
from bad_replica import answered, bad_replica, url_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from memfd import soon
from models import Net
from schoolhouse import encodings, errors
from schoolhouse.remote.session import Session
from schoolhouse_server import serve
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc
from torch import nn

HELPERS = Path(__file__).parents[1] / "helpers"


class Gate(nn.Module):
    """Counts its forwards, and holds each until it is opened."""

    def __init__(self):
        super().__init__()
        self.opened, self.entered, self.calls = threading.Event(), threading.Event(), 0

    def forward(self, x):
        self.calls += 1
        self.entered.set()
        assert self.opened.wait(30)
        return x + 1


def test_cancelled_requests_are_not_computed():
    gate = Gate()
    with serve(gate) as server, sh.connect(server.url) as teacher:
        futures = [teacher.submit((torch.zeros(1),), {}, [""])]
        assert gate.entered.wait(20)
        futures += [teacher.submit((torch.full((1,), float(i)),), {}, [""]) for i in range(1, 10)]
        assert soon(lambda: server.load("teacher").queued == 9)
        assert all(future.cancel() for future in futures[1:])
        assert soon(lambda: server.load("teacher").queued == 0)
        gate.opened.set()
        assert futures[0].result(10)[""].item() == 1
        assert teacher.submit((torch.ones(1),), {}, [""]).result(10)[""].item() == 2
        assert gate.calls == 2


def test_what_a_client_that_leaves_had_queued_is_dropped():
    gate = Gate()
    with serve(gate) as server:
        with sh.connect(server.url) as teacher:
            futures = [teacher.submit((torch.full((1,), float(i)),), {}, [""]) for i in range(10)]
            assert gate.entered.wait(20)
            assert soon(lambda: server.load("teacher").queued == 9)
        for future in futures:
            with pytest.raises(errors.TeacherUnavailableError):
                future.result(10)
        assert soon(lambda: server.load("teacher").queued == 0)
        gate.opened.set()
        assert soon(lambda: server.engines["teacher"].running == 0)
        assert gate.calls == 1


def test_more_than_max_pending_is_refused():
    gate = Gate()
    with serve(gate) as server, sh.connect(server.url, sharing=sh.Sharing(max_pending=3)) as teacher:
        futures = [teacher.submit((torch.ones(1),), {}, [""]) for _ in range(3)]
        with pytest.raises(errors.TeacherBusyError, match="max_pending"):
            teacher.submit((torch.ones(1),), {}, [""])
        gate.opened.set()
        assert [future.result(10)[""].item() for future in futures] == [2, 2, 2]


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.opened, self.fc = threading.Event(), nn.Linear(3, 2)

    def forward(self, x):
        assert self.opened.wait(30)
        return self.fc(x)


@pytest.mark.parametrize("timeout_s", [0.2, 20.0])
def test_a_callback_that_would_wait_for_its_own_thread_is_refused(timeout_s):
    late, x, ended = Late(), torch.ones(1, 3), queue.Queue[object]()
    wish = {"fc": encodings.hidden("fc")}

    def submit(_future=None):
        try:
            ended.put(teacher.submit((x,), {}, ["fc"], encodings=wish))
        except errors.UsageError as err:
            ended.put(err)

    with serve(late, allow_head=True) as server, sh.connect(server.url, head_folder=None) as teacher:
        teacher.submit((x,), {}, ["fc"]).add_done_callback(submit)
        if timeout_s > 1:
            late.opened.set()
        else:
            dispatcher = teacher._dispatcher
            assert soon(lambda: dispatcher._where)
            [request] = dispatcher._where
            request.clock.deadline = time.monotonic() + timeout_s
            dispatcher._loop.call(dispatcher.outstanding.schedule, request)
        with pytest.raises(errors.UsageError, match="the head 'fc' is not here yet, and a callback of a future"):
            raise ended.get(timeout=20)  # at once, and not after the timeout of 60 s
        late.opened.set()
        submit()
        assert ended.get(timeout=20).result(20)["fc"].shape == (1, 2)
        teacher.submit((x,), {}, ["fc"]).add_done_callback(submit)
        assert ended.get(timeout=20).result(20)["fc"].shape == (1, 2)  # the head is here by now


def test_a_head_that_waits_for_a_forward_holds_up_nobody():
    late, x = Late(), torch.ones(1, 3)
    with (
        serve(late, allow_head=True) as server,
        sh.connect(server.url, head_folder=None) as teacher,
        ThreadPoolExecutor(1) as pool,
    ):
        engine, first = server.engines["teacher"], teacher.submit((x,), {}, [""])
        assert soon(lambda: engine.running == 1)
        second = teacher.submit((x + 1,), {}, [""])
        states = pool.submit(lambda: teacher.submit((x,), {}, ["fc"], encodings={"fc": encodings.hidden("fc")}))
        assert soon(lambda: sum(job.in_flight for job in server.load("teacher").jobs) == 3)
        assert engine.queued == 1
        second.cancel()
        assert soon(lambda: engine.queued == 0)  # the session still hears what its client says
        late.opened.set()
        assert torch.allclose(states.result(20).result(20)["fc"].dense(), first.result(20)[""])


def test_features_for_which_there_is_no_memory_fail_at_once_and_alone(monkeypatch):
    def full(*_args):
        raise MemoryError

    with serve(nn.Identity()) as server, sh.connect(server.url) as teacher:
        with monkeypatch.context() as patch:
            patch.setattr("schoolhouse.remote.request.decoded", full)
            with pytest.raises(MemoryError):
                teacher.submit((torch.ones(1),), {}, [""]).result(10)
        [session] = teacher.open_sessions()
        assert teacher.submit((torch.ones(1),), {}, [""]).result(10)[""].item() == 1
        assert teacher.open_sessions() == [session]


def test_a_session_that_opens_while_the_teacher_is_closed_ends(monkeypatch):
    opening, closed, original = threading.Event(), threading.Event(), Session.start

    def slow(session):
        opening.set()
        assert closed.wait(10)
        original(session)

    with serve(nn.Identity()) as server, ThreadPoolExecutor(1) as pool:
        teacher = sh.connect(server.url, timeouts=sh.Timeouts(request_s=5))
        monkeypatch.setattr(Session, "start", slow)
        submitted = pool.submit(teacher.submit, (torch.ones(1),), {}, [""])
        assert opening.wait(10)
        teacher.close()
        closed.set()
        with pytest.raises(errors.TeacherUnavailableError):
            submitted.result(10).result(10)
        assert soon(lambda: not teacher.open_sessions())


def test_inputs_may_be_changed_after_submit():
    gate, x = Gate(), torch.zeros(300_000)  # too large to stand in the header
    with serve(gate) as server, sh.connect(server.url) as teacher:
        future = teacher.submit((x,), {}, [""])
        x.fill_(7)
        gate.opened.set()
        assert future.result(10)[""].eq(1).all()


class Reusing(nn.Module):
    """Returns the same memory each time, with other contents."""

    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(30_000_000)

    def forward(self, x):
        return self.memory.fill_(x.item())


def test_memory_that_a_module_writes_again_is_delivered_as_it_was():
    with serve(Reusing()) as server, sh.connect(server.url) as teacher:
        futures = [teacher.submit((torch.tensor(float(i)),), {}, [""]) for i in range(6)]
        for i, future in enumerate(futures):
            assert future.result(60)[""].eq(i).all()


def other_inputs(reply):
    reply.input_digest = bytes(16)


def other_revision(reply):
    reply.revision = "r2"


def other_tap(reply):
    reply.taps[0].module = "a"


def other_bytes(reply):
    reply.payload.data = bytes(8)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda _reply: None, None),
        (other_inputs, errors.FeatureMismatchError),
        (other_revision, errors.FeatureMismatchError),
        (other_tap, errors.FeatureMismatchError),
        (other_bytes, errors.CorruptPayloadError),
    ],
    ids=["honest", "inputs", "revision", "tap", "bytes"],
)
def test_features_of_another_request_are_refused(change, error):
    def answers(call):
        message = answered(call, 1.0)
        change(message.reply)
        return [message]

    with bad_replica("r1", answers, ["", "a"]) as (replica, _), sh.connect(url_of(replica)) as teacher:
        future = teacher.submit((torch.ones(1),), {}, [""])
        if error is None:
            assert torch.equal(future.result(30)[""], torch.ones(2))
        else:
            with pytest.raises(error):
                future.result(30)


def test_a_teacher_pickles_as_its_address():
    with serve(Net()) as server, sh.connect(server.url, timeouts=sh.Timeouts(request_s=7.0)) as teacher:
        with pickle.loads(pickle.dumps(teacher)) as copy:
            assert copy.url == teacher.url
            assert copy.submit((torch.ones(1, 8),), {}, [""]).result(10)[""].shape == (1, 5)


def ask_in_a_child(teacher, results):
    results.put(teacher.submit((torch.ones(1, 8),), {}, [""]).result(20)[""].shape)


def test_a_spawned_process_connects_anew():
    context = multiprocessing.get_context("spawn")
    with serve(Net()) as server, sh.connect(server.url) as teacher:
        results = context.Queue()
        child = context.Process(target=ask_in_a_child, args=(teacher, results))
        child.start()
        assert results.get(timeout=60) == (1, 5)
        child.join(20)
        assert child.exitcode == 0


def test_a_student_trains_where_ray_cannot_be_imported():
    code = """
import sys
sys.modules["ray"] = None
import torch, schoolhouse as sh
model = sh.convert(torch.nn.Linear(8, 5), mode=[("kd_loss", {
    "teacher_model": sys.argv[1], "criterion": sh.LogitsDistillationLoss()})])
model(torch.randn(4, 8))
model.compute_kd_loss().backward()
assert model.weight.grad.abs().sum() > 0
assert sum(p.numel() for p in model.parameters()) == 45
assert not [name for name, m in sys.modules.items() if name.split(".")[0] in ("ray", "schoolhouse_server") and m]
"""
    with serve(Net()) as server:
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, server.url], check=True, timeout=120)


def test_health_reflection_and_watch():
    with serve({"one": Net(), "two": Net(seed=3)}) as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
            check = health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(service="one"), timeout=20)
            assert check.status == health_pb2.HealthCheckResponse.SERVING
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            (answer,) = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(asked, timeout=20)
            names = {service.name for service in answer.list_services_response.service}
            assert {"schoolhouse.v1.TeacherService", "schoolhouse.v1.DirectoryService"} <= names
            stub = directory_pb2_grpc.DirectoryServiceStub(opened)
            watch = stub.Watch(directory_pb2.WatchRequest(teacher="two"), timeout=20)
            first = next(watch)
            assert (first.teacher, len(first.replicas), first.wanted) == ("two", 1, 1)
            watch.cancel()
            with pytest.raises(grpc.RpcError) as caught:
                next(stub.Watch(directory_pb2.WatchRequest(teacher="three"), timeout=20))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_public_names():
    assert sorted(sh.__all__) == sorted(Path(__file__).with_name("public_names.txt").read_text().split())
    assert all(hasattr(sh, name) for name in sh.__all__)
