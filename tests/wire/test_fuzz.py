"""Any bytes whatever that come to a replica get a typed answer, in time, and leave nothing behind. See `make fuzz`."""

import threading

import pytest
from fuzzing import Live, Source, parse, session_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memfd import memfds, soon


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(min_size=1, max_size=2000))
def test_any_message_is_taken_or_gets_a_typed_error(data):
    for message in session_of(Source(data)):
        parse(message)


@pytest.fixture(scope="module")
def live():
    with Live() as found:
        yield found
        threads = threading.active_count()
        assert soon(lambda: found.server.load("teacher").sessions == 0)
        assert soon(lambda: memfds()[0] == 0)
        assert soon(lambda: threading.active_count() <= threads)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(min_size=1, max_size=2000))
def test_any_session_is_answered_or_ends_with_a_typed_status(live, data):
    live.send(session_of(Source(data)))
    assert live.wrong() == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(min_size=1, max_size=2000))
def test_so_does_any_session_through_pipes(live, data):
    live.send_through_pipes(session_of(Source(data))[1:])
    assert live.wrong() == []
