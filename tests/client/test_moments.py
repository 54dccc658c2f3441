"""What two threads of a client do in the same moment, brought about on purpose: no request is lost, none waits."""

import contextlib
import dataclasses
import socket
import threading
import time
import types

import pytest
import schoolhouse as sh
import torch
from directories import DRAINING, DirectoryServer, Scale, addresses, answer, ask, entry, replicas, sessions
from memfd import soon
from schoolhouse import errors
from schoolhouse.remote import teacher as remote
from schoolhouse.remote.flow_control import Window
from schoolhouse.remote.pending import Outstanding
from schoolhouse.remote.request import Clock
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2


@dataclasses.dataclass(eq=False)
class Sized:
    """What a window asks of a request."""

    nbytes: int = 1
    done: bool = False

    def send(self, now):
        return True


class Between:
    """A lock. `then` is called once, by whoever has released it."""

    def __init__(self, then):
        self._lock, self._then = threading.Lock(), then

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *_exc):
        self._lock.release()
        then, self._then = self._then, lambda: None
        then()


def test_a_session_that_ends_while_another_thread_sends_loses_no_request():
    window = Window()
    window.grant(teacher_pb2.Opened(max_in_flight=4))
    asked = [Sized() for _ in range(3)]
    for request in asked:
        assert window.add(request)
    started = []
    window._lock = Between(lambda: started.append(window.next(0.0)))
    lost = window.end()
    assert started == [None]
    assert lost == asked
    assert [len(window), window.next(0.0), window.add(Sized())] == [0, None, False]


def test_what_falls_due_while_requests_are_tried_again_is_not_forgotten(monkeypatch):
    with DirectoryServer() as directory, replicas(Scale(2)) as (server,):
        directory.publish(server)
        with sh.connect(directory.url, timeouts=sh.Timeouts(request_s=30), follow_revisions=True) as teacher:
            assert answer(teacher) == 2
            server.close()
            ask(teacher)
            dispatcher = teacher._dispatcher
            flush, tend, asked = dispatcher._flush, dispatcher._tend, threading.Event()
            dispatcher.outstanding._tend = asked.set  # only here, from now on
            dispatcher.outstanding.stir()
            assert asked.wait(20)  # by the thread, which is not at the real one any more
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
            assert tend() == due_at
            monkeypatch.undo()


def test_deadlines_of_what_is_answered_take_no_memory():
    outstanding, clock = Outstanding(10, lambda request: None, lambda: None), Clock(time.monotonic() + 1e6)
    for number in range(10_000):
        outstanding.add(types.SimpleNamespace(number=number, clock=clock))
        outstanding.remove(number)
    assert len(outstanding._deadlines) < 500


def test_a_reply_that_begins_as_its_request_is_cancelled_leaves_nothing(monkeypatch):
    module = Scale(2)
    with serve(module, shared_memory_bytes=0) as server, sh.connect(server.url) as teacher:
        assert answer(teacher) == 2
        [session] = teacher.open_sessions()
        asked, over = [], threading.Event()

        class Slow(framing.Incoming):
            def __init__(self, *args):
                super().__init__(*args)
                if asked:
                    asked.pop().cancel()
                    if soon(lambda: not len(session._window)):
                        over.set()

        here = types.SimpleNamespace(**vars(framing) | {"Incoming": Slow})  # and not in the server
        monkeypatch.setattr("schoolhouse.remote.session.framing", here)
        module.gate.clear()
        asked.append(teacher.submit((torch.zeros(1 << 20),), {}, [""]))
        module.gate.set()
        assert over.wait(30)
        assert answer(teacher, 3) == 6
        assert session._partial == {}


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
        connect = teacher._connect
        monkeypatch.setattr(teacher, "_connect", lambda: (connect(), teacher.close())[0])
        assert isinstance(ask(teacher).exception(20), errors.TeacherUnavailableError)
        assert teacher._dispatcher.closed


def test_threads_that_cannot_be_had_are_tried_again(monkeypatch):
    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        start = threading.Thread.start

        def refused(thread):
            if thread.name == "schoolhouse-watch":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="new thread"):
            ask(teacher)
        monkeypatch.undo()
        assert answer(teacher) == 2
        names = {thread.name for thread in threading.enumerate()}
        assert {"schoolhouse-watch", "schoolhouse-deadlines"} <= names


def test_closing_waits_for_no_lock_of_the_threads():
    """The garbage collector may close a teacher in a thread that holds one of them, within its own wait."""
    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        assert answer(teacher) == 2
        dispatcher = teacher._dispatcher
        own = [*vars(dispatcher._watch).values(), *vars(dispatcher.outstanding).values()]
        own = [getattr(one, "_cond", one) for one in own]  # that of an event
        done = threading.Event()

        def held():
            with contextlib.ExitStack() as stack:
                for one in own:
                    if hasattr(one, "acquire"):
                        stack.enter_context(one)
                closing = threading.Thread(target=lambda: (dispatcher.outstanding.stir(), teacher.close(), done.set()))
                closing.start()
                assert done.wait(20)

        held()


def test_closing_while_another_thread_takes_what_is_parked():
    class Emptied(dict):
        left = 1

        def __len__(self):
            self.left -= 1
            return self.left + 1

    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        assert answer(teacher) == 2
        dispatcher = teacher._dispatcher
        dispatcher._parked._since = Emptied()
        teacher.close()
        assert dispatcher.outstanding._closed
