"""A request is a machine of states: it does what its table has and nothing else, and nobody else changes it."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import schoolhouse
from schoolhouse.errors import TeacherUnavailableError
from schoolhouse.remote.request import TRANSITIONS, Clock, Question, Request
from schoolhouse.teachers.protocol import Features

HOUSE = Path(schoolhouse.__file__).parent
OWNER = HOUSE / "remote" / "request.py"
ARGUMENTS = {  # of the events that take any
    "park": (3.0, 60.0),
    "follow": ("r2", {}),
    "queue": (4.0,),
    "send": (5.0,),
    "answer": (Features({}, revision="r", input_digest=b""), "a:1"),
    "fail": (TeacherUnavailableError("it is gone"),),
}
WAYS = {  # how a request gets into each state
    "new": [],
    "parked": ["park"],
    "queued": ["queue"],
    "sent": ["queue", "send"],
    "answered": ["queue", "send", "answer"],
    "failed": ["fail"],
    "cancelled": ["cancel"],
}
ENDS = {"answered", "failed", "cancelled"}
EVENTS = [line.event for line in TRANSITIONS]
NEXT = {(state, line.event): line.next or state for line in TRANSITIONS for state in line.states}


def on(request, event):
    return getattr(request, event)(*ARGUMENTS.get(event, ()))


def made(state):
    question = Question(outgoing=None, wanted=None, revision="r", heads={}, limits=None)
    request = Request(question, 10.0)
    for event in WAYS[state]:
        on(request, event)
    assert request.state == state
    return request


def about(request):
    return {**vars(request), "clock": dict(vars(request.clock))}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", WAYS)
def test_what_the_table_has_happens_and_nothing_else(state, event):
    request = made(state)
    before = about(request)
    if state in ENDS:  # it may have come while another thread was about to do that
        assert not on(request, event)
    elif (state, event) in NEXT:
        on(request, event)
    else:
        with pytest.raises(AssertionError, match=f"a request that is {state} was told to {event}"):
            on(request, event)
    assert request.state == NEXT.get((state, event), state)
    if (state, event) not in NEXT:
        assert about(request) == before


def test_the_table_has_each_state_and_each_event_once():
    states = {state for line in TRANSITIONS for state in (*line.states, *filter(None, [line.next]))}
    assert states == {*WAYS}
    assert len({*EVENTS}) == len(EVENTS)
    assert not ENDS & {state for line in TRANSITIONS for state in line.states}
    assert [state for state, event in NEXT if event == "answer"] == ["sent"]
    [cls] = [node for node in ast.parse(OWNER.read_text()).body if getattr(node, "name", "") == "Request"]
    told = [
        (method.name, call.args[0].value)
        for method in cls.body
        for call in ast.walk(method)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self._on"
    ]
    assert sorted(told) == sorted((event, event) for event in EVENTS)


def test_the_docstring_has_the_table():
    for line in TRANSITIONS:
        row = f"| {', '.join(line.states)} | {line.event} | {line.next or 'the same'} | {line.caller} |"
        assert row in inspect.getdoc(Request)


def test_a_request_remembers_what_was_lost_and_what_must_be_sent_again():
    request = made("queued")
    request.lose()  # no replica had it
    assert (request.losses, request.is_retry) == (0, True)
    request.queue(1.0)
    request.send(2.0)
    assert (request.losses, request.is_retry, request.asked_at) == (0, False, 2.0)
    request.lose(apart_from="a:1")
    assert (request.losses, request.is_retry, request.question.apart_from) == (1, True, "a:1")
    request.queue(3.0)
    request.send(4.0)
    assert not request.told_to_wait
    request.wait()
    request.take_back()
    assert (request.losses, request.is_retry, request.told_to_wait) == (1, False, True)
    request.queue(5.0)
    request.send(6.0)
    request.turn_away()
    assert (request.losses, request.is_retry, request.moved) == (1, True, False)
    request.move()
    assert request.follow("r2", {})
    assert (request.moved, request.question.revision, request.question.apart_from) == (True, "r2", "a:1")


def test_what_a_request_asks_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made("new").question.revision = "r2"


def test_a_clock_stands_still_while_it_waits_and_all_its_waits_have_one_limit():
    clock = Clock(10.0)
    assert not clock.start(1.0)
    assert clock.stop(4.0, 20.0)  # with 6 s left
    assert not clock.stop(5.0, 20.0)
    assert clock.deadline == 24.0
    assert clock.start(9.0)
    assert clock.deadline == 15.0
    assert clock.stop(12.0, 20.0)  # with 3 s left, after a wait of 5 s
    assert clock.deadline == 27.0
    assert clock.start(13.0)
    assert clock.deadline == 16.0


def stores(tree):
    """What stands before the dot, and the attribute, wherever one is assigned or deleted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("setattr", "__setattr__"):
            yield ast.unparse(node.args[0]), ast.unparse(node.args[1]).strip("'")


OWN = {
    attribute
    for node in ast.parse(OWNER.read_text()).body
    if getattr(node, "name", "") in ("Request", "Clock")
    for owner, attribute in stores(node)
    if owner == "self"
}


def changed(source):
    """The requests' attributes that a file changes; one of `self` is that of another class."""
    requests = {"request", "first", "second"}
    return [
        f"{owner}.{attribute}"
        for owner, attribute in stores(ast.parse(source))
        if owner != "self" and (attribute in OWN or requests & {*owner.split(".")})
    ]


@pytest.mark.parametrize(
    "source",
    [
        "request.losses += 1",
        "one.clock.deadline = 0.0",
        "found[1].asked_at, idle = now, False",
        "self.request.hello: int = 1",
        "for first.span in spans: pass",
        "del second._state",
        "setattr(lost[0], 'moved', True)",
    ],
)
def test_a_change_is_seen(source):
    assert len(changed(source)) == 1


def test_no_other_file_changes_a_request():
    assert {"losses", "_state", "deadline", "_left_s", "question", "answered_by"} <= OWN
    found = {path: changed(path.read_text()) for path in HOUSE.rglob("*.py") if path != OWNER}
    assert len(found) > 50
    assert {path: what for path, what in found.items() if what} == {}
