"""OpenTelemetry spans across client and replica: who is whose child, what they say, and that off is off."""

import gc
import pickle
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future

import pytest
import schoolhouse as sh
import torch
from models import Net
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from schoolhouse.tracing import Tracer
from schoolhouse_server import serve
from torch import nn

STAGES = {"schoolhouse.queue", "schoolhouse.h2d", "schoolhouse.forward", "schoolhouse.encode", "schoolhouse.d2h"}
EXPORTER = InMemorySpanExporter()


@pytest.fixture(scope="module", autouse=True)
def provider():
    """The program's provider, which can be set once."""
    found = TracerProvider()
    found.add_span_processor(SimpleSpanProcessor(EXPORTER))
    trace.set_tracer_provider(found)


@pytest.fixture(autouse=True)
def _empty():
    EXPORTER.clear()


class Sleepy(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        time.sleep(self.seconds)
        return self.layer(x)


class Gated(nn.Module):
    """Computes once it is opened."""

    def __init__(self):
        super().__init__()
        self.entered, self.open = threading.Event(), threading.Event()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        self.entered.set()
        assert self.open.wait(30)
        return self.layer(x)


class Wrong(nn.Module):
    def forward(self, x):
        raise ValueError(f"a secret: {x.flatten()[0].item()}")


def soon(condition):
    """Wait for it."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def count(name):
    """How many spans of that name have ended. A client's does after its future has its result."""
    return sum(span.name == f"schoolhouse.{name}" for span in EXPORTER.get_finished_spans())


def ended(*names):
    """The spans by name, once there is one of each of these."""
    soon(lambda: set(names) <= {span.name for span in EXPORTER.get_finished_spans()})
    return {span.name: span for span in EXPORTER.get_finished_spans()}


def test_a_request_is_one_trace(x):
    with (
        serve(Sleepy(0.2), tracing=True) as server,
        sh.connect(server.url, job="exp", tracing=True) as teacher,
    ):
        with trace.get_tracer("test").start_as_current_span("step") as step:
            features = teacher.submit((x,), {}, ["layer"]).result()
        revision = features.revision
    spans = ended("schoolhouse.features", "schoolhouse.answer", "schoolhouse.send", *STAGES)
    client, answer = spans["schoolhouse.features"], spans["schoolhouse.answer"]
    assert client.parent.span_id == step.get_span_context().span_id
    assert answer.parent.span_id == client.context.span_id
    assert answer.parent.is_remote
    for name in (*STAGES, "schoolhouse.send"):
        assert spans[name].parent.span_id == answer.context.span_id
        assert answer.start_time <= spans[name].start_time <= spans[name].end_time <= answer.end_time
    assert len({span.context.trace_id for span in spans.values()}) == 1
    assert (client.kind, answer.kind) == (trace.SpanKind.CLIENT, trace.SpanKind.SERVER)
    assert spans["schoolhouse.forward"].end_time - spans["schoolhouse.forward"].start_time >= 0.2e9
    assert spans["schoolhouse.queue"].end_time <= spans["schoolhouse.forward"].start_time
    told = dict(client.attributes)
    assert told.pop("schoolhouse.sent_bytes") >= x.numel() * 4
    assert told.pop("schoolhouse.received_bytes") >= 6 * 8 * 4
    assert told == {
        "schoolhouse.teacher": "teacher",
        "schoolhouse.revision": revision,
        "schoolhouse.job": "exp",
        "schoolhouse.taps": ("layer:output",),
        "schoolhouse.retries": 0,
    }
    assert answer.attributes["schoolhouse.job"] == "exp"
    assert answer.status.is_ok
    assert client.status.is_ok


def test_the_second_waits_in_the_queue(x):
    gated = Gated()
    with serve(gated, tracing=True) as server, sh.connect(server.url) as teacher:
        engine = server.engines["teacher"]
        one = teacher.submit((x,), {}, [""])
        soon(lambda: engine.running == 1)
        other = teacher.submit((x + 1,), {}, [""])
        soon(lambda: engine.queued == 1)
        time.sleep(0.2)
        gated.open.set()
        one.result(), other.result()
    waits = [span.end_time - span.start_time for span in EXPORTER.get_finished_spans() if span.name.endswith("queue")]
    assert len(waits) == 2
    assert max(waits) >= 0.2e9


def test_who_joins_another_ones_forward_has_only_its_own_part_of_it(x):
    gated = Gated()
    with serve(gated, tracing=True) as server, sh.connect(server.url) as first, sh.connect(server.url) as second:
        engine = server.engines["teacher"]
        one = first.submit((x,), {}, [""])
        assert gated.entered.wait(30)
        time.sleep(0.2)
        other = second.submit((x,), {}, [""])
        soon(lambda: engine.joined == 1)
        gated.open.set()
        assert torch.equal(one.result()[""], other.result()[""])
    soon(lambda: count("answer") == 2)
    spans = EXPORTER.get_finished_spans()
    answers = {span.context.span_id: span for span in spans if span.name == "schoolhouse.answer"}
    forwards = [span for span in spans if span.name == "schoolhouse.forward"]
    assert len(answers) == len(forwards) == 2
    for forward in forwards:
        assert forward.start_time >= answers[forward.parent.span_id].start_time
    shorter, longer = sorted(span.end_time - span.start_time for span in forwards)
    assert longer - shorter >= 0.2e9


def test_an_error_is_its_type_alone(x):
    with serve(Wrong(), tracing=True) as server, sh.connect(server.url, tracing=True) as teacher:
        with pytest.raises(sh.errors.TeacherForwardError):
            teacher.submit((x,), {}, [""]).result()
        spans = ended("schoolhouse.features", "schoolhouse.answer")
    for span in spans.values():
        assert span.status.status_code is trace.StatusCode.ERROR
        assert span.attributes["error.type"] == "TeacherForwardError"
        assert "secret" not in span.to_json()


def test_a_request_that_is_sent_again_counts_it():
    span = Tracer().request(teacher="t", revision="r", job="", taps=["a:output"], sent_bytes=1)
    assert span.sent() == span.sent()  # replicas that were asked answer in one trace
    future = Future()
    future.set_result(None)
    span.done(future)
    assert ended("schoolhouse.features")["schoolhouse.features"].attributes["schoolhouse.retries"] == 1


def test_cancelled_on_both_sides(x):
    gated = Gated()
    with serve(gated, tracing=True) as server, sh.connect(server.url, tracing=True) as teacher:
        engine = server.engines["teacher"]
        running = teacher.submit((x,), {}, [""])
        soon(lambda: engine.running == 1)
        future = teacher.submit((x + 1,), {}, [""])
        soon(lambda: engine.queued == 1)
        assert future.cancel()
        soon(lambda: count("answer") == 1)
        gated.open.set()
        running.result()
        soon(lambda: count("answer") == count("features") == 2)
    spans = EXPORTER.get_finished_spans()
    for name in ("schoolhouse.features", "schoolhouse.answer"):
        assert sum(span.attributes.get("schoolhouse.cancelled", False) for span in spans if span.name == name) == 1
        assert sum(span.name == name for span in spans) == 2


def test_a_client_that_does_not_trace_and_a_replica_that_does_not(x):
    with serve(Net()) as server, sh.connect(server.url, tracing=True) as teacher:
        teacher.submit((x,), {}, [""]).result()
    assert ended("schoolhouse.features").keys() == {"schoolhouse.features"}
    EXPORTER.clear()
    with serve(Net(), tracing=True) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()
        assert ended("schoolhouse.answer")["schoolhouse.answer"].parent is None


def test_features_are_freed_though_their_spans_are_kept(x):
    with serve(Net(), tracing=True) as server, sh.connect(server.url, tracing=True) as teacher:
        features = teacher.submit((x,), {}, [""]).result()
        gone = weakref.ref(features[""])
        del features
        soon(lambda: gc.collect() >= 0 and gone() is None)
        assert ended("schoolhouse.features")


def test_off_makes_no_span_and_imports_nothing(x):
    with serve(Net()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()
        assert teacher._tracer is None
    assert not EXPORTER.get_finished_spans()
    code = "import sys, schoolhouse, schoolhouse.tracing as t; assert t.tracer(False) is None; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=150
    ).stdout
    assert "schoolhouse.tracing" in loaded
    assert "opentelemetry" not in loaded


def test_without_the_extra_it_is_named(monkeypatch):
    with serve(nn.Linear(2, 2)) as server:
        monkeypatch.setitem(sys.modules, "opentelemetry", None)
        for make in (lambda: sh.connect(server.url, tracing=True), lambda: serve(nn.Linear(2, 2), tracing=True)):
            with pytest.raises(sh.errors.ConfigError, match=r"schoolhouse\[otel\]"):
                make()
    with pytest.raises(sh.errors.ConfigError, match="tracing is 'yes'"):
        sh.connect("grpc://localhost:1/t", tracing="yes")


def test_a_wrong_traceparent_is_a_new_trace():
    found = Tracer()
    for wrong in ("", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 100_000):
        context = found.extract(wrong)
        assert not trace.get_current_span(context).get_span_context().is_valid
    span = trace.get_tracer("test").start_span("parent")
    assert trace.get_current_span(found.extract(found.inject(span))).get_span_context().span_id == (
        span.get_span_context().span_id
    )


def test_a_copy_of_a_teacher_traces_too(x):
    with serve(Net()) as server, sh.connect(server.url, tracing=True) as teacher:
        with pickle.loads(pickle.dumps(teacher)) as copy:
            assert torch.equal(copy.submit((x,), {}, [""]).result()[""], teacher.submit((x,), {}, [""]).result()[""])
    soon(lambda: count("features") == 2)
