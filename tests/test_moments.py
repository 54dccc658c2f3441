"""What two threads of a client do in the same moment, brought about on purpose: no request is lost, none waits."""

import dataclasses
import threading

from schoolhouse.window import Window
from schoolhouse_wire.v1 import teacher_pb2


@dataclasses.dataclass(eq=False)
class Sized:
    """What a window asks of a request."""

    nbytes: int = 1
    done: bool = False
    told_to_wait: bool = False
    losses: int = 0


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
    window._lock = Between(lambda: started.append(window.next()))
    lost = window.end()
    assert started == [None]
    assert lost == asked
    assert [len(window), window.next(), window.add(Sized())] == [0, None, False]
