"""Who is let in, told to wait and told to go on, without a server."""

import threading

import pytest
from memfd import soon
from schoolhouse_server.session import admission
from schoolhouse_server.session.admission import Admission, FloodError, Place
from schoolhouse_server.session.quotas import Sharing
from schoolhouse_wire.loop import Loop


@pytest.fixture
def timer():
    made = Loop("admission").start()
    yield made
    made.stop()


class Session(Place):
    """Notes what it is told."""

    def __init__(self, among, job):
        self.told = []
        super().__init__(job, among._sharing, lambda i: self.told.append(i), lambda: self.told.append("go on"))
        among.enter(self)


def test_small_requests_do_not_pass_a_large_one_of_their_job(timer):
    among = Admission(Sharing(max_job_bytes=100), timer)
    small, large, other = Session(among, "j"), Session(among, "j"), Session(among, "other")
    assert among.admit(small, 1, 60)
    assert not among.admit(large, 1, 80)
    assert not among.admit(small, 2, 30)  # it would fit, and so would the next one, and the next
    assert among.admit(other, 1, 90)
    among.end(small, 1)
    assert (small.told, large.told) == ([2], [1, "go on"])
    assert among.admit(large, 1, 80)
    assert not among.admit(small, 3, 30)
    among.end(large, 1)
    assert small.told == [2, 3, "go on"]


def test_more_than_a_jobs_bytes_goes_alone_and_without_end_only_then(timer):
    among = Admission(Sharing(max_job_bytes=100), timer)
    one, two = Session(among, "j"), Session(among, "j")
    assert among.admit(one, 1, 10)
    assert among.admit(one, 2, 10)
    assert not among.admit(two, 1, 500)
    among.end(one, 1)
    assert two.told == [1]
    among.end(one, 2)
    assert two.told == [1, "go on"]
    assert among.admit(two, 1, 500)
    assert among.in_flight() == {"j": 1}


def test_a_place_is_kept_for_who_waits_but_not_for_ever(timer, monkeypatch):
    monkeypatch.setattr(admission, "_RESERVED_S", 0.05)
    at, go_on = timer.at, threading.Semaphore(0)
    monkeypatch.setattr(timer, "at", lambda when, ring: at(when, lambda: go_on.acquire(timeout=20) and ring()))
    among = Admission(Sharing(max_in_flight=1), timer)
    one, two, three = (Session(among, "j") for _ in range(3))
    assert among.admit(one, 1, 1)
    assert not among.admit(two, 1, 1)
    assert not among.admit(three, 1, 1)
    among.end(one, 1)
    assert not among.admit(one, 2, 1)
    assert (two.told, three.told) == ([1, "go on"], [1])
    go_on.release()
    assert soon(lambda: three.told == [1, "go on"])  # the second does not come
    among.leave(three)
    assert one.told == [2, "go on"]
    assert among.in_flight() == {"j": 1}  # reserved
    go_on.release(2)  # also what rings for the third, which has left
    assert soon(lambda: among.in_flight() == {})


def test_the_queues_bound_is_shared_by_who_waits_in_their_order(timer):
    among = Admission(Sharing(max_queued=2), timer)
    sessions = [Session(among, f"job-{i}") for i in range(4)]
    assert among.admit(sessions[0], 1, 1)
    assert among.admit(sessions[0], 2, 1)
    for session in sessions[1:]:
        assert not among.admit(session, 1, 1)
    among.end(sessions[0], 1)
    assert not among.admit(sessions[0], 3, 1)
    assert [session.told[-1] for session in sessions] == [3, "go on", 1, 1]
    assert among.admit(sessions[1], 1, 1)
    among.end(sessions[0], 2)
    among.end(sessions[1], 1)
    assert [session.told[-1] for session in sessions] == [3, "go on", "go on", "go on"]


def test_a_client_that_does_not_read_waits_and_keeps_nobody_else_out(timer):
    among = Admission(Sharing(max_in_flight=2), timer)
    deaf, other = Session(among, "j"), Session(among, "j")
    for i in range(4):
        assert among.admit(deaf, i, 1)
        among.reply(deaf, i)
    assert not among.admit(deaf, 4, 1)
    assert among.admit(other, 1, 1)
    among.sent(deaf, 0)
    assert deaf.told == [4, "go on"]
    assert among.admit(deaf, 4, 1)


def test_who_goes_on_although_told_to_wait_is_ended(timer):
    among = Admission(Sharing(max_in_flight=2), timer)
    session = Session(among, "j")
    assert [among.admit(session, i, 1) for i in range(4)] == [True, True, False, False]
    with pytest.raises(FloodError, match="told to wait"):
        among.admit(session, 4, 1)
    among.leave(session)
    assert among.in_flight() == {}
    assert not among.admit(session, 9, 1)


def test_what_was_cancelled_is_not_held_against_a_client_that_has_not_heard_yet(timer):
    among = Admission(Sharing(max_in_flight=2), timer)
    session = Session(among, "j")
    assert [among.admit(session, i, 1) for i in range(2)] == [True, True]
    for i in range(2, 100):  # it has two in flight at most, as far as it knows
        assert not among.admit(session, i, 1)
        among.cancelled(session, i)
    assert not among.admit(session, 100, 1)
    among.end(session, 0)
    assert session.told[-1] == "go on"
    assert among.admit(session, 101, 1)
