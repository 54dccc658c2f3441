"""What a replica logs: one JSON object a line, about whom, and nothing of what it was given."""

import io
import json
import logging
from datetime import datetime, timezone

import programs
import pytest
import schoolhouse as sh
import torch
from memfd import soon
from models import Net
from schoolhouse_server import serve
from schoolhouse_server.common import logs
from schoolhouse_server.engine.runner import Runner
from torch import nn

SECRET = "9.876543"


class Chatty(nn.Module):
    """Says in its error what it was given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        raise ValueError(f"cannot take {x}")


@pytest.fixture
def lines():
    """The JSON lines that are logged from here on, parsed."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter(replica="r1"))
    logger = logging.getLogger("schoolhouse_server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def record(message="hello", *args, error=None, **extra):
    found = logging.LogRecord("schoolhouse_server.x", logging.WARNING, "x.py", 1, message, args, None)
    found.created = 1_700_000_000.25
    found.__dict__.update(extra)
    if error is not None:
        found.exc_info = (type(error), error, error.__traceback__)
    return found


def raised(make):
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as cause:
            raise make("it broke\nbadly") from cause
    except Exception as err:
        return err


def test_a_line_is_an_object_with_what_it_is_about():
    formatter = logs.JsonFormatter(teacher="resnet", replica="r1")
    line = formatter.format(record("got %d\nrows \u2028", 3, job='a"b\n', session="s1", request=7, other="no"))
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {
        "time": datetime.fromtimestamp(1_700_000_000.25, timezone.utc).isoformat(timespec="milliseconds"),
        "level": "WARNING",
        "logger": "schoolhouse_server.x",
        "message": "got 3\nrows \u2028",
        "teacher": "resnet",
        "replica": "r1",
        "job": 'a"b\n',
        "session": "s1",
        "request": 7,
    }


def test_an_error_is_its_type_its_causes_and_where():
    line = json.loads(logs.JsonFormatter().format(record(error=raised(RuntimeError))))
    assert (line["error"], line["causes"], line["error_message"]) == ("RuntimeError", ["KeyError"], "it broke\nbadly")
    assert line["stack"][-1].endswith(" raised")
    assert SECRET not in json.dumps(line)


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()], ids=["json", "text"])
def test_what_a_teachers_code_said_is_not_logged(formatter):
    shown = formatter.format(record(error=raised(sh.errors.TeacherForwardError)))
    assert "TeacherForwardError" in shown
    assert "badly" not in shown


def test_text_is_a_line_that_nobody_can_forge():
    shown = logs.TextFormatter(replica="r1").format(record("bad\nname \x1b[2J", job="x\n2026 ERROR forged"))
    assert len(shown.splitlines()) == 1
    assert "\x1b" not in shown
    assert shown.endswith('[replica="r1" job="x\\n2026 ERROR forged"]')


def test_ring_keeps_the_last():
    ring = logs.RingHandler(3)
    for i in range(5):
        ring.handle(record(f"line {i}"))
    assert [line.split(": ")[1] for line in ring.lines(2)] == ["line 3", "line 4"]
    assert len(ring.lines(100)) == 3
    assert ring.lines(0) == []


def test_formats_have_names():
    assert isinstance(logs.formatter("json"), logs.JsonFormatter)
    with pytest.raises(sh.errors.ConfigError, match="choices: 'text', 'json'"):
        logs.formatter("xml")


def test_sessions_and_failed_requests_are_logged_with_their_ids(lines):
    x = torch.full((2, 8), float(SECRET))
    with serve({"net": Net(), "chatty": Chatty()}) as server:
        with sh.connect(server.urls["chatty"], job="exp-42") as teacher:
            with pytest.raises(sh.errors.TeacherForwardError):
                teacher.submit((x,), {}, [""]).result()
    own = lambda: [one for one in lines() if one.get("job") == "exp-42"]  # noqa: E731  # earlier tests' may end here
    assert soon(lambda: len(own()) == 3)
    began, failed, ended = own()
    assert [one["message"] for one in (began, failed, ended)] == [
        "a session began",
        "a request failed: TeacherForwardError",
        "a session ended",
    ]
    for one in (began, failed, ended):
        assert (one["teacher"], one["job"], one["session"]) == ("chatty", "exp-42", began["session"])
        assert one["replica"] == "r1"
    assert failed["request"] == 1
    assert "request" not in began
    assert SECRET[:4] not in json.dumps(lines())


def test_what_the_server_did_wrong_is_logged_with_its_stack(lines, monkeypatch, x):
    def broken(*_args):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Runner, "_check", broken)
    with serve(Net()) as server, sh.connect(server.url, job="exp") as teacher:
        with pytest.raises(sh.errors.TeacherInternalError, match="its log says more"):
            teacher.submit((x,), {}, [""]).result()
    [failed] = [one for one in lines() if one["level"] == "ERROR"]
    assert (failed["error"], failed["error_message"], failed["job"], failed["request"]) == (
        "ZeroDivisionError",
        "ours",
        "exp",
        1,
    )
    assert any("_admit" in frame for frame in failed["stack"])


def test_set_up_is_for_programs_and_serve_configures_nothing(x):
    code = (
        "import logging, torch; from schoolhouse_server import serve; from schoolhouse_server.common import logs\n"
        "with serve(torch.nn.Linear(2, 2)): pass\n"
        "assert not logging.getLogger('schoolhouse_server').handlers and not logging.getLogger().handlers\n"
        "ring = logs.RingHandler(5)\n"
        "logs.set_up('json', ring, teacher='t', replica='r'); logs.set_up('json', ring, teacher='t', replica='r')\n"
        "logging.getLogger('schoolhouse_server.x').info('hello')\n"
        "print(ring.lines(9))"
    )
    done = programs.run("-c", code)
    [line] = done.stderr.splitlines()  # once, though it was set up twice
    found = json.loads(line)
    assert (found["message"], found["teacher"], found["replica"]) == ("hello", "t", "r")
    assert done.stdout.count("hello") == 1
