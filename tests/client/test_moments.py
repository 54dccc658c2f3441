"""What happens to a client in the same moment, brought about on purpose: no request is lost, none waits."""

import contextlib
import dataclasses
import socket
import threading
import time
import types

import pytest
import schoolhouse as sh
import torch
from directories import DRAINING, DirectoryServer, Scale, addresses, answer, ask, entry, replicas, sessions, tasks
from memfd import soon
from schoolhouse import errors
from schoolhouse.remote import connections
from schoolhouse.remote import teacher as remote
from schoolhouse.remote.flow_control import Window
from schoolhouse.remote.pending import Outstanding
from schoolhouse.remote.request import Clock
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2


@dataclasses.dataclass(eq=False)
class Sized:
    """What a window asks of a request."""

    nbytes: int = 1
    done: bool = False

    def send(self, now):
        return True

    def wait(self):
        pass


def test_a_session_that_ends_loses_no_request():
    window = Window()
    window.grant(teacher_pb2.Opened(max_in_flight=2))
    asked = [Sized() for _ in range(4)]
    for request in asked:
        assert window.add(request)
    started = [window.next(0.0), window.next(0.0), window.next(0.0)]
    assert started == [(1, asked[0]), (2, asked[1]), None]
    window.wait(1)
    assert window.end() == [asked[1], asked[0], *asked[2:]]
    assert [len(window), window.next(0.0), window.add(Sized())] == [0, None, False]


def in_the_loop(step):
    """What `step` returns, called in the event loop of this process' clients."""

    async def stepping():
        return step()

    return connections.connections().loop.run(stepping()).result(30)


def test_what_falls_due_while_requests_are_tried_again_is_not_forgotten(monkeypatch):
    with DirectoryServer() as directory, replicas(Scale(2)) as (server,):
        directory.publish(server)
        with sh.connect(directory.url, timeouts=sh.Timeouts(request_s=30), follow_revisions=True) as teacher:
            assert answer(teacher) == 2
            server.close()
            ask(teacher)
            dispatcher = teacher._dispatcher
            flush, tend = dispatcher._flush, dispatcher._tend
            dispatcher.outstanding._tend = lambda: None  # only here, from now on
            [link] = dispatcher._links
            assert soon(lambda: dispatcher._parked and link.session is None)
            now = time.monotonic()
            monkeypatch.setattr("schoolhouse.remote.dispatcher.time", types.SimpleNamespace(monotonic=lambda: now))
            link.retry_at = due_at = now + 0.2
            dispatcher._parked._say_at = now + 30.0
            dispatcher._links.draining()  # what was known of it is found anew

            def slow():
                nonlocal now
                flush()
                now += 0.3

            dispatcher._flush = slow
            assert in_the_loop(tend) == due_at
            monkeypatch.undo()


def test_deadlines_of_what_is_answered_take_no_memory():
    loop = Loop("test-loop").start()
    outstanding, clock = Outstanding(loop, 10, lambda request: None, lambda: None), Clock(time.monotonic() + 1e6)

    async def ask():
        for number in range(10_000):
            request = types.SimpleNamespace(number=number, clock=clock)
            outstanding.add(request)
            outstanding.schedule(request)
            outstanding.remove(number)

    loop.run(ask()).result(30)
    assert len(outstanding._deadlines) < 500
    loop.stop()


@pytest.mark.parametrize("shared_memory_bytes", [0, 64 << 20])
def test_a_reply_that_begins_as_its_request_is_cancelled_leaves_nothing(shared_memory_bytes, monkeypatch):
    module, checked = Scale(2), sh.Transport(checksums=True)
    with (
        serve(module, shared_memory_bytes=shared_memory_bytes) as server,
        sh.connect(server.url, transport=checked) as teacher,
    ):
        assert answer(teacher) == 2
        [session] = teacher.open_sessions()
        asked, over = [], threading.Event()

        class Slow(framing.Incoming):
            def __init__(self, *args):
                super().__init__(*args)
                if asked:
                    asked.pop().cancel()
                    elsewhere = not connections.connections().loop.runs_here
                    assert elsewhere == bool(shared_memory_bytes)
                    if not elsewhere or soon(lambda: not len(session._window)):
                        over.set()

        here = types.SimpleNamespace(**vars(framing) | {"Incoming": Slow})  # and not in the server
        monkeypatch.setattr("schoolhouse.remote.session.framing", here)
        module.gate.clear()
        asked.append(teacher.submit((torch.zeros(1 << 20),), {}, [""]))
        module.gate.set()
        assert over.wait(30)
        assert answer(teacher, 3) == 6
        assert session._partial == {}
        assert len(session._window) == 0


def test_a_job_that_pauses_keeps_a_session_with_its_revision(kept_port):
    with serve(Scale(2)) as one, serve(Scale(2), port=kept_port) as other, DirectoryServer() as directory:
        directory.publish(one)
        with sh.connect(directory.url) as teacher:
            assert answer(teacher) == 2
            directory.publish(entry(one, state=DRAINING), entry(other))
            assert soon(lambda: sessions(teacher) == addresses(other))
            other.close()
            with serve(Scale(2), port=kept_port):
                assert soon(lambda: sessions(teacher) == addresses(other))
            directory.publish(one)
            assert soon(lambda: sessions(teacher) == addresses(one))


def test_connecting_takes_no_longer_than_it_may():
    with contextlib.ExitStack() as stack, DirectoryServer() as directory:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(40)]  # they never answer
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in silent]
        directory.publish(*(directory_pb2.Replica(id=address, address=address) for address in addresses))
        began = time.monotonic()
        with pytest.raises(errors.TeacherUnavailableError, match="within"):
            sh.connect(directory.url, timeouts=sh.Timeouts(connect_s=1))
        assert time.monotonic() - began < 15  # and no second for each


def test_a_teacher_that_is_closed_as_it_connects_is_closed(monkeypatch):
    with serve(Scale(2)) as server:
        teacher = remote.RemoteTeacher(server.url)
        first = teacher._first

        async def closed():
            found = await first()
            teacher.close()
            return found

        monkeypatch.setattr(teacher, "_first", closed)
        assert isinstance(ask(teacher).exception(20), errors.TeacherUnavailableError)
        assert teacher._dispatcher.closed


def test_a_thread_that_cannot_be_had_is_tried_again(monkeypatch):
    monkeypatch.setattr(connections, "_connections", None)
    with serve(Scale(2)) as server:
        start = threading.Thread.start

        def refused(thread):
            if thread.name == "schoolhouse-client":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            with pytest.raises(RuntimeError, match="new thread"):
                sh.connect(server.url)
        with sh.connect(server.url) as teacher:
            assert answer(teacher) == 2
        connections.stop()


def test_closing_waits_for_no_lock():
    """The garbage collector may close a teacher in a thread that holds one of them."""
    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        assert answer(teacher) == 2
        dispatcher, done = teacher._dispatcher, threading.Event()
        with connections._guard, dispatcher.outstanding._lock, dispatcher._loop._lock:
            closing = threading.Thread(target=lambda: (teacher.close(), done.set()))
            closing.start()
            assert done.wait(20)


def test_closing_ends_all_that_is_parked_whatever_callbacks_do_meanwhile():
    server = serve(Scale(2))
    with sh.connect(server.url) as teacher:
        assert answer(teacher) == 2
        server.close()
        futures = [ask(teacher, i) for i in range(20)]
        assert soon(lambda: len(teacher._dispatcher._parked._since) == 20)
        for i, future in enumerate(futures):
            future.add_done_callback(lambda _, i=i: (futures[-1 - i].cancel(), teacher.close()))
        teacher.close()
        assert soon(lambda: all(future.done() for future in futures))
        assert isinstance(futures[0].exception(), errors.TeacherUnavailableError)
        assert futures[-1].cancelled()
        assert soon(lambda: tasks() == []), tasks()
